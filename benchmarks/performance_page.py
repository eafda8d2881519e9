"""Write docs/performance.md from the run files of the speed benchmarks.

python benchmarks/performance_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from results_autoregressive import decoding
from tables import made_with

DOCS = Path(__file__).resolve().parent.parent / "docs"
INTRO = """# Performance

This page is written by `python benchmarks/performance_page.py` from the run files in `docs/runs/`; each section names its
command, date and hardware. Times are CPU seconds of one thread unless said otherwise.

`pipe.compile()` gives the networks of a pipeline to `torch.compile`: a pass of a diffusion network, the step of one token, the
blocks of a next-scale model, each compiled once and not again from step to step. Caches, masks, guidance and attention over a
cache stay outside. On the CPU the weights of diffusion and next-token networks are also laid out anew for the batch size
(`freeze=False` saves that second copy); on CUDA steps are replayed as CUDA graphs. It pays from the second call on: the first
takes seconds to minutes.
"""


def reached(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What came out and what bounds it, from the same files as the tables below."""
    lines = [decoded(name, r) for name, r in runs.get("autoregressive_speed", {}).get("models", {}).items()]
    for name, r in runs.get("diffusion_speed", {}).get("models", {}).items():
        compiled, plain = (r["ratio"][key] for key in ("genkit, compiled", "genkit"))
        lines.append(
            f"- **{name}**: compiled {compiled:.2f} times as fast as diffusers' pipeline, without compiling {plain:.2f} times; "
            f"images differ by {r['largest_difference']:.0e}."
        )
    if "attention" in runs:
        run = runs["attention"]
        worst = max(row["default_over_best"] for row in run["rows"])
        flex = "" if "flex" in run["backends"] else " FlexAttention was left out: it compiles for each shape."
        lines.append(
            f"- **Attention**: the default takes at most {worst:.2f} times as long as the best backend of any shape.{flex}"
        )
    devices = {run.get("device", run["hardware"]["device"]) for run in runs.values()}
    lines += ["- None of this was measured on a GPU."] if devices == {"cpu"} else []
    return ["## What was reached, and what bounds it", "", *lines, ""] if lines else []


def decoded(name: str, r: dict[str, Any]) -> str:
    """A sentence on one model, and what takes most of the time on both sides."""
    seconds, passes = r["seconds"], r["passes"]
    official, products, reading = seconds["official"], seconds["matmuls"], r["reading_weights"]
    best = seconds.get("compiled", seconds["genkit"])
    said = f"- **{name}**: {r['ratio']:.2f} times as fast as the official code. "
    if best < products:
        each = f"{products:.1f} s of the official {official:.1f} s"
        said += f"All of it takes {best:.1f} s, less than the matrix products as they stand ({each}): weights are laid out anew."
        return said
    if reading > products / 2:  # with few rows a product takes as long as its weights take to come
        work, least = f"Reading {r['weight_bytes'] / 1e9:.2f} GB of weights {passes} times takes", min(reading, products)
    else:
        rate = f"{r['flop'] / 1e9:.0f} GFLOP at {r['flop'] / products / 1e9:.0f} GFLOP/s"
        work, least = f"The matrix products as they stand ({rate}) take", products
    return f"{said}{work} {least:.1f} of the official {official:.1f} s: {official / least:.1f} times, if all else took no time."


def sampling(run: dict[str, Any]) -> list[str]:
    text = (
        f"Images by {run['steps']} DDIM steps with CFG, in float32, the same random weights, first noise and network rows; "
        f"least of {run['rounds']} interleaved rounds. Times as fast as diffusers in brackets."
    )
    names = list(next(iter(run["models"].values()))["seconds"])
    lines = [f"| model | {' | '.join(f'{name}, s' for name in names)} | images differ by | first compiled call, s |"]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for model, r in run["models"].items():
        cells = [f"{r['seconds'][n]:.2f}" + (f" ({r['ratio'][n]:.2f})" if n != "diffusers" else "") for n in names]
        lines.append(f"| {model} | {' | '.join(cells)} | {r['largest_difference']:.1e} | {r['first_compiled_call']:.0f} |")
    return ["## DiT sampling beside diffusers", "", made_with(run), "", text, "", *lines, ""]


def backends(run: dict[str, Any]) -> list[str]:
    shown = [name for name in ("auto", *run["backends"]) if any(name in row["seconds"] for row in run["rows"])]
    device = "CPU" if run["device"] == "cpu" else "GPU"
    text = (
        f"{device} ms of one call, two rows, least of {run['rounds']} interleaved rounds or more; `auto` is the default. Empty: "
        "it cannot do it, or was not timed further because it is more than twenty times slower. The last column is at most 1.05."
    )
    share = any("share_of_limit" in row for row in run["rows"])
    head = [*(f"`{name}`" for name in shown), *(["share of the limit"] if share else []), "auto / best"]
    lines = [f"| shape | dtype | {' | '.join(head)} |", "|---|---|" + "---:|" * len(head)]
    for row in run["rows"]:
        cells = [f"{row['seconds'][n] * 1e3:.3f}" if n in row["seconds"] else "" for n in shown]
        cells += [f"{row['share_of_limit']:.0%}"] if share else []
        lines.append(f"| {row['case']} | {row['dtype']} | {' | '.join(cells)} | {row['default_over_best']:.2f} |")
    return ["## Attention", "", made_with(run), "", text, "", *lines, ""]


def kernels(run: dict[str, Any]) -> list[str]:
    text = (
        "Each Triton kernel runs on CUDA; elsewhere torch computes the same. MB moved, by the formula of each kernel, plain and "
        "fused. On the CPU, where the networks use the plain form, milliseconds of it and of the kernel's torch fallback."
    )
    lines = [
        "| kernel | shape | dtype | on | plain MB | fused MB | plain ms | fallback ms |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for r in run["rows"]:
        figures = [f"{r[key] / 1e6:.1f}" for key in ("bytes_plain", "bytes_fused")]
        figures += [f"{r[key]:.2f}" if key in r else "" for key in ("plain_ms", "fallback_ms")]
        lines.append(f"| {r['kernel']} | {r['shape']} | {r['dtype']} | {r['on']} | {' | '.join(figures)} |")
    return ["## Fused kernels", "", made_with(run), "", text, "", *lines, ""]


def hoisting(run: dict[str, Any]) -> list[str]:
    text = (
        f"What is the same at every step, computed once (`hoist`); least of {run['repeats']} interleaved runs with and without."
    )
    lines = ["| network | linear layers | with hoist | share of the time | outputs change by |", "|---|---:|---:|---:|---:|"]
    for r in run["networks"].values():
        before, after = r["linear_calls"]
        lines.append(f"| {r['about']} | {before} | {after} | {r['time_share']:.3f} | {r['change']:.1e} |")
    return ["## Exact savings that are not attention", "", made_with(run), "", text, "", *lines, ""]


SECTIONS = {
    "autoregressive_speed": decoding,
    "diffusion_speed": sampling,
    "attention": backends,
    "kernels": kernels,
    "hoist": hoisting,
}


def page(runs: dict[str, dict[str, Any]]) -> str:
    lines = [line for name, section in SECTIONS.items() if name in runs for line in section(runs[name])]
    return "\n".join([INTRO, *reached(runs), *lines])


def main() -> None:
    found = {name: DOCS / "runs" / f"{name}.json" for name in SECTIONS}
    runs = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    (DOCS / "performance.md").write_text(page(runs))


if __name__ == "__main__":
    main()
