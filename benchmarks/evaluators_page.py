"""Write docs/evaluators.md, genkit-eval beside its peers, from docs/runs/eval_parity.json and docs/runs/eval_speed.json.

python benchmarks/evaluators_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import made_with

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: Keys of the speed run, and what is asked of them.
WORK = {
    "frechet": "Fréchet distance of two {images:,} x {columns:,} statistics",
    "neighbours": "neighbours among {images:,} x {columns:,} features",
    "neighbours_50k": "neighbours among 50,000 x {columns:,} features",
    "extraction": "Inception features of {pictures} images of 256 pixels",
}


def parity(run: dict[str, Any]) -> list[str]:
    worst = max(row["relative_difference"] for row in run["rows"])
    peers = ", ".join(
        f"{name} {run['peers'][name]}" for name in ("torch-fidelity", "pytorch-fid", "clean-fid") if name in run["peers"]
    )
    photographs = (
        f"{run['photographs']} altered ImageNet photographs of 256 pixels against as many others, and "
        if run["photographs"]
        else ""
    )
    text = (
        f"The same images through {peers} and genkit-eval, with the same Inception weights of 2015's layout, random and "
        f"seeded: {photographs}{run['drawn']} drawn images in each set. Asked is the protocol that promises the peer's rule. The "
        f"largest relative difference is {worst:.1e}, the tolerance {run['tolerance']:g}. As the weights are random, the numbers "
        "say whether two programs agree, and nothing about images."
    )
    lines = ["| images | peer | metric | protocol | theirs | ours | relative difference |", "|---|---|---|---|---:|---:|---:|"]
    for row in run["rows"]:
        figures = f"{row['theirs']:.6g} | {row['ours']:.6g} | {row['relative_difference']:.1e}"
        lines.append(f"| {row['images']} | {row['peer']} | {row['metric']} | `{row['protocol'].split('@')[0]}` | {figures} |")
    missing = [f"Not installed here: {', '.join(run['not_installed'])}.", ""] if run["not_installed"] else []
    return ["## Agreement", "", made_with(run), "", text, "", *lines, "", *missing]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.4f}" for name, number in value.items() if name != "f_score")
    return f"{value:.10g}"


def speed(run: dict[str, Any]) -> list[str]:
    text = (
        f"One run, {run['threads']} threads; each row a process of its own, the best of {run['repeats']} in turns. Memory is "
        "what the peak of the process lies above what it held when its input was there."
    )
    lines = ["| work | by | CPU s | wall s | MiB | value |", "|---|---|---:|---:|---:|---|"]
    for key, work in WORK.items():
        for name, found in run.get(key, {}).items():
            by = name.split(", ", 1)[1]
            figures = f"{found['cpu_s']:.1f} | {found['wall_s']:.1f} | {found['extra_mib']:,.0f}"
            lines.append(f"| {work.format(**run)} | {by} | {figures} | {_value(found['value'])} |")
    return ["## Speed and memory", "", made_with(run), "", text, "", *lines, ""]


def main() -> None:
    runs = {name: json.loads((DOCS / "runs" / f"{name}.json").read_text()) for name in ("eval_parity", "eval_speed")}
    head = [
        "# genkit-eval beside its peers",
        "",
        "This page is written by `python benchmarks/evaluators_page.py` from `docs/runs/eval_parity.json` and "
        "`docs/runs/eval_speed.json`.",
        "",
    ]
    (DOCS / "evaluators.md").write_text("\n".join([*head, *parity(runs["eval_parity"]), *speed(runs["eval_speed"])]))


if __name__ == "__main__":
    main()
