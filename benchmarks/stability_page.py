"""How far attention is from float64: docs/runs/attention_deviation.json, docs/images/attention_deviation.png, docs/stability.md.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/stability_page.py [--device cuda] [--backends sdpa ...]

Runs ``python -m genkit.attention.deviation`` and keeps what it writes; ``--page`` only writes page and image anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from record import save
from tables import made_with

from genkit.attention import deviation
from genkit.attention import deviation_report as report

DOCS = Path(__file__).resolve().parent.parent / "docs"
RUN = DOCS / "runs" / "attention_deviation.json"
IMAGE = DOCS / "images" / "attention_deviation.png"

ABOUT = """`python -m genkit.attention.deviation --out DIR` measures every backend of attention that the machine has, and every
kernel of `genkit.attention.kernels`, against float64; it also compares images of the built-in models along a whole run. It ends
with an error if one of them exceeds the bound that `genkit.attention.deviation.BOUNDS` states for it and its dtype."""

METHOD = """- The reference of a measurement is float64 on *the same rounded inputs*: so it is the arithmetic that is measured.
- **Band**: what rounding of the inputs, and of the output, does by itself (the first two rows, added). A result may deviate by a
  stated number of bands. For float32 that number is large because the sums, too, are kept in float32; for half precision it
  is at most 1, which a kernel keeps only if it adds up in float32.
- `naive` is softmax attention with every operation in the dtype. `W1` is the Wasserstein-1 distance between the distributions of
  the output's entries, `bias` the mean difference.
- `low_rank` computes exactly at these shapes, because their scores are too large for it. `sample_logits` deviates by how much
  less likely than the best the token is that it draws: 0 means the same token. Backends that are not listed were not measured."""


def factor(measured: list[dict[str, Any]], one: str, other: str, dtype: str) -> str:
    """Range over shapes of the RMS of one over that of another."""
    rms = {(x["name"], x["keys"], x["head_size"], x["gain"]): x["rms"] for x in measured if x["dtype"] == dtype}
    ratios = [value / rms[other, *key[1:]] for key, value in rms.items() if key[0] == one and (other, *key[1:]) in rms]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def compared(measured: list[dict[str, Any]]) -> list[str]:
    """What the paper says, and what was found."""
    flash = "sdpa:flash"
    return [
        'Golden et al. 2024, "Is Flash Attention Stable?" ([2405.02803](https://arxiv.org/abs/2405.02803)), report about ten '
        "times the deviation of baseline attention for FlashAttention in BF16. That is another kernel, another baseline and "
        "another machine. Here, in bfloat16, over the shapes below:",
        "",
        f"- the tiled kernel of this machine (`{flash}`) has {factor(measured, flash, 'sdpa:math', 'bfloat16')} times the RMS "
        "deviation of `sdpa:math`, which computes in float32 and rounds once,",
        f"- and {factor(measured, flash, 'naive', 'bfloat16')} times that of naive bfloat16, "
        f"{factor(measured, flash, 'inputs rounded', 'bfloat16')} times what rounding the inputs does.",
        "",
        "So the factor of ten is not seen on this machine. The emulation below shows what tiles alone do: with every result "
        "rounded, the accumulators too, small tiles deviate more, but by less than that.",
    ]


def page(run: dict[str, Any]) -> list[str]:
    measured = run["attention"]
    names, shape = list(dict.fromkeys(x["name"] for x in measured)), run["emulated"][0]
    return [
        "# Numeric stability of attention",
        "",
        "This page is written by `python benchmarks/stability_page.py` from `docs/runs/attention_deviation.json`.",
        "",
        ABOUT,
        "",
        f"{made_with(run)} · torch {run['machine']['torch']}, {run['machine']['device']}",
        "",
        f"![Deviation by dtype, by mantissa and tile, and along the steps](images/{IMAGE.name})",
        "",
        "## Every backend and kernel, at its worst shape",
        "",
        METHOD,
        "",
        *report.summary(measured + run["kernels"]),
        "",
        "## Beside the paper",
        "",
        *compared(measured),
        "",
        "RMS in bfloat16, in units of the output (values are drawn with variance 1; `gain` is the standard deviation of the "
        "scores; of 513 keys one query asks, as in decoding, else up to 256):",
        "",
        *report.by_length(measured, names),
        "",
        "## Mantissa and tile, emulated",
        "",
        "`genkit.attention.rounding.tiled_attention` is FlashAttention's online softmax in float64 with the result of every "
        f"operation rounded to some bits, the accumulators too. {shape['keys']} keys, head size {shape['head_size']}, scores of "
        f"standard deviation {shape['gain']:g}. Deviation falls by half with each bit and grows with the number of tiles; one "
        "tile is the plain softmax; without rounding, tiles change nothing (RMS below 1e-15). Tests hold it to these laws.",
        "",
        *report.emulated(run["emulated"]),
        "",
        "## Images and tokens of the built-in models",
        "",
        "Against a float64 network with the reference backend, on the same seeds. Pixels are in [-1, 1], so one of 255 levels is "
        "7.8e-3. `attention in bfloat16` rounds queries, keys, values and results of attention alone; `autocast` lowers the "
        "convolutions and matrix products as well.",
        "",
        *report.diffusion(run["trajectories"]),
        "",
        "Logits are those of the same given tokens; then the same seeds draw anew. Once one token differs, those after it are "
        "another image's.",
        "",
        *report.tokens(run["trajectories"]),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+")
    args = parser.parse_args()
    if not args.page:
        options = ["--device", args.device, *(["--backends", *args.backends] if args.backends else [])]
        with tempfile.TemporaryDirectory() as folder:
            deviation.main(["--out", folder, *options])
            save(RUN, json.loads((Path(folder) / "deviation.json").read_text()))
    run = json.loads(RUN.read_text())
    IMAGE.write_bytes(report.plot(run))
    (DOCS / "stability.md").write_text("\n".join(page(run)))


if __name__ == "__main__":
    main()
