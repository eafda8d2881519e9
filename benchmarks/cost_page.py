"""Write docs/attention_cost.md: the counts of genkit.attention.cost, and the run file of benchmarks/low_rank.py.

python benchmarks/cost_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import made_with

from genkit.attention import cost

DOCS = Path(__file__).resolve().parent.parent / "docs"

COUNTS = """`python -m genkit.attention.cost` counts what an image costs, from the sizes of a network alone. A pair is a
query that looks at a key; FLOPs are those of matrix products, as `torch.utils.flop_counter` counts them. The
tests hold the counts to what torch counts while genkit's networks (and a DiT of diffusers) run, and those of
DiT to its paper.

| drawing | pairs per layer and row, with a cache | without |
|---|---|---|
| scales of n_1, ..., n_K tokens, N_k = n_1 + ... + n_k | sum_k n_k N_k | sum_k sum_(j <= k) n_j N_j |
| T tokens in a row after P of the condition, N = P + T - 1 | N (N + 1) / 2 | sum_(i = P..N) i (i + 1) / 2 |
| S steps of diffusion over T tokens | S T^2 (nothing to cache) | S T^2 |

A pair costs 4 w FLOPs in each layer of width w; a position costs 24 w^2 in the matrices of a block (VAR, DiT),
or 8 w^2 + 6 w h with SwiGLU of width h (LlamaGen). So attention is T / (6 w + T) of a block's FLOPs over T
tokens: that share is the most that any way to compute attention can save."""

GROWTH = """Over the side n of the token grid, with scales 1, 2, 4, ..., n, as multiples of n^4. All three ways are quartic
in n; a next-scale model looks at 64/45 n^4 pairs in log2(n) + 1 passes, a raster at n^4 / 2 in n^2 passes,
diffusion at n^4 in every step. Ke et al. 2025, "On Computational Limits and Provably Efficient Criteria of
Visual Autoregressive Models" ([2501.04377](https://arxiv.org/abs/2501.04377)), show for VAR that less than
about n^4 is out of reach (under SETH, with heads of width O(log n)) once entries reach order sqrt(log n), and
that n^(2 + o(1)) is possible below that, by a low-rank approximation."""

LOW_RANK = """That approximation is `genkit.attention.low_rank`: exp by its Taylor polynomial of degree g, which is a product
of C(d + g, g) features, so that no scores are formed. It is the backend `low_rank`, used only if asked for by
name (`use_attention("low_rank")`). Before each call it bounds its own error from the norms of queries and keys
and from the mean squared score, in linear time, and computes exactly where the bound is above its tolerance, or
where there is a mask."""


def command(text: str) -> list[str]:
    return ["```", f"python -m genkit.attention.cost {text}".strip(), "```", ""]


def errors(run: dict[str, Any]) -> list[str]:
    first = run["errors"][0]
    lines = [
        f"Error at {first['tokens']} tokens with heads of width 64, queries and keys in random directions, in units of v "
        "(variance 1; the column `output` is the standard deviation of what is approximated). `largest score` is what there "
        "is, `limit` what the norms allow:",
        "",
        "| limit | largest score | output | degree 1 (rank 65): error | bound | degree 2 (rank 2145): error | bound |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for limit in dict.fromkeys(line["limit"] for line in run["errors"]):
        one, two = (line for line in run["errors"] if line["limit"] == limit)
        cells = [f"{x['error']:.1e} | {'none' if x['bound'] is None else format(x['bound'], '.1e')}" for x in (one, two)]
        lines.append(f"| {limit:g} | {one['score']:.2f} | {one['output']:.3f} | {' | '.join(cells)} |")
    return [*lines, ""]


def times(run: dict[str, Any]) -> list[str]:
    lines = [
        "CPU milliseconds of one call, float32, 2 heads, one thread, the probe included, the minimum of interleaved runs; exact "
        f"is torch's scaled_dot_product_attention. The load average of the machine was {run['load_average']:.1f} at the end. The "
        "break-even by multiplications is a count; `faster from` was measured.",
        "",
        "| head | degree | rank | tokens: exact, low rank | break-even by multiplications | faster from |",
        "|---:|---:|---:|---|---:|---:|",
    ]
    for x in run["times"]:
        pairs = "; ".join(f"{t['tokens']}: {t['exact']:.2f}, {t['low_rank']:.2f}" for t in x["times"])
        first = x["first_faster"] or f"not up to {x['times'][-1]['tokens']}"
        lines.append(f"| {x['head_size']} | {x['degree']} | {x['rank']} | {pairs} | {x['multiplications']:.0f} | {first} |")
    return [*lines, ""]


def networks(run: dict[str, Any]) -> list[str]:
    lines = [
        "Scores of the built-in models over all layers and steps, with CFG(3), after the mean key is subtracted, and the share "
        f"of calls whose bound keeps the tolerance of {run['tolerance']:g} (for values that differ by at most 2):",
        "",
        "| model | calls | largest score: least, 10 %, median, 90 %, most | R | degree 1 | degree 2 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for x in run["networks"]:
        scores = ", ".join(f"{value:.1f}" for value in (x["smallest"], *x["score"], x["largest"]))
        shares = " | ".join(f"{x['within_tolerance'][f'degree_{g}']:.0%}" for g in (1, 2))
        lines.append(f"| {x['model'].removeprefix('builtin/')} | {x['calls']} | {scores} | {x['entry']:.1f} | {shares} |")
    return [*lines, ""]


def verdict(run: dict[str, Any]) -> list[str]:
    """What follows from the numbers of the run."""
    passed = any(share for x in run["networks"] for share in x["within_tolerance"].values())
    found = {(x["head_size"], x["degree"]): x["first_faster"] for x in run["times"]}
    never = [f"{d} at degree {g}" for (d, g), first in found.items() if first is None]
    faster = [f"from {first} tokens with heads of {d} at degree {g}" for (d, g), first in found.items() if first is not None]
    lines = [
        f"So it takes less time {' and '.join(faster) or 'nowhere'}"
        + (f", and never with {' or '.join(never)}." if never else ".")
    ]
    if not passed:
        lines.append(
            "In none of the built-in models is a single call bounded enough: there the backend computes exactly everywhere, and "
            "costs the probe on top. It is an instrument to look at a network with, and an option for one of small scores."
        )
    return [" ".join(lines), ""]


def main() -> None:
    run = json.loads((DOCS / "runs" / "low_rank.json").read_text())
    table = cost.table({name: network.cost() for name, network in cost.MODELS.items()})
    without = cost.table({name: cost.MODELS[name].cost(cache=False) for name in ("var-d16", "llamagen-B")})
    lines = ["# What attention costs", "", "This page is written by `python benchmarks/cost_page.py`.", "", COUNTS, ""]
    lines += ["## One image", "", "With guidance (two rows), diffusion with 50 steps. These are counts, not measurements.", ""]
    lines += [*command(""), *table, "", "Without a cache of keys and values:", ""]
    lines += [*command("--no-cache --model var-d16 llamagen-B"), *without, ""]
    lines += ["## Growth with resolution", "", GROWTH, "", *command("--growth"), *cost.growth_table(cost.growth()), ""]
    lines += ["## Less than quadratic: low rank", "", LOW_RANK, "", made_with(run), ""]
    lines += [*errors(run), *times(run), *networks(run), *verdict(run)]
    (DOCS / "attention_cost.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
