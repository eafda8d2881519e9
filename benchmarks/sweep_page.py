"""A sweep over scale and interval, and a tuning run, with the built-in model: docs/runs/{sweep,tune}.json and docs/sweep.md.

    python benchmarks/sweep_page.py [--num-samples 400] [--trials 24]

Goes on where it was stopped; ``--page`` only writes the page anew from the run files.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import ROOT, SAMPLER, STEPS, keep, read
from genkit_eval.pareto import USUAL, best_first, known, value_of
from genkit_eval.report.plots import against
from genkit_eval.runs import read_run
from genkit_eval.table import format_number
from tables import cell, made_with

OUT = Path("runs") / "sweep_page"
TEMPLATE = "Interval(CFG({w}), {lo}, {hi})"
SCALES, LOWS, HIGHS = ("2", "3", "4", "5"), ("0", "0.02", "0.1", "0.28", "2"), ("5.42", "80")
GRID = ("w=2:5:1", f"lo={','.join(LOWS)}", f"hi={','.join(HIGHS)}")
RANGES = ("w=1:8", "lo=0.01:2:log", "hi=2:80:log")
METRICS = ("frechet", "precision", "recall")


def commands(samples: int, trials: int, out: Path) -> dict[str, list[str]]:
    """The two commands, as typed behind ``genkit-eval``."""
    shared = ["--num-samples", str(samples), "--block-size", "100", "--sampler", SAMPLER, "--steps", str(STEPS)]
    grid = [part for text in GRID for part in ("--grid", text)]
    ranges = [part for text in RANGES for part in ("--range", text)]
    # The first guidance is what differences are taken to.
    sweep = ["sweep", "--out", str(out / "sweep"), "--guidance", "none", "--guidance", TEMPLATE, *grid, *shared]
    budget = ["--budget", f"{samples * trials} images"]
    return {"sweep": sweep, "tune": ["tune", "--out", str(out / "tune"), "--guidance", TEMPLATE, *ranges, *budget, *shared]}


def shown(command: list[str]) -> list[str]:
    """A command in a block, one option a line where it is long."""
    text = shlex.join(["genkit-eval", *command])
    return ["```", text.replace(" --guidance", " \\\n  --guidance").replace(" --num-samples", " \\\n  --num-samples"), "```", ""]


def table(entries: list[dict[str, Any]]) -> list[str]:
    """The Pareto front, best distance first."""
    best = best_first(entries, known(entries, USUAL))
    titles = [entries[0]["metrics"][name]["title"] for name in METRICS]
    lines = [f"| guidance | NFE | {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) + 1)]
    for entry in best:
        cells = [cell(entry["metrics"][name]) for name in METRICS]
        lines.append(f"| `{entry['label']}` | {entry['cost']['nfe_mean']:.1f} | {' | '.join(cells)} |")
    return lines


def matrix(entries: list[dict[str, Any]], name: str) -> list[str]:
    """One metric over intervals (down) and scales (across), with the evaluations of each interval."""
    found = {entry["label"]: entry for entry in entries}
    lines = [f"| interval | NFE | {' | '.join(f'scale {w}' for w in SCALES)} |", "|---|" + "---:|" * (len(SCALES) + 1)]
    values = {text: value_of(entry, name) or 0.0 for text, entry in found.items()}
    best = min(values.values()) if name == "frechet" else max(values.values())
    for hi in HIGHS:
        for lo in LOWS:
            row = [TEMPLATE.format(w=w, lo=lo, hi=hi) for w in SCALES]
            cells = [f"**{format_number(values[t])}**" if values[t] == best else format_number(values[t]) for t in row]
            nfe = found[row[0]]["cost"]["nfe_mean"]
            lines.append(f"| {lo} to {hi} | {nfe:.0f} | {' | '.join(cells)} |")
    return lines


def plot(docs: Path, entries: list[dict[str, Any]], across: str, name: str, about: str) -> list[str]:
    """Write a plot and return the line that shows it."""
    (docs / "images").mkdir(exist_ok=True)
    (docs / "images" / f"{name}.png").write_bytes(against(entries, across, "frechet"))
    return [f"![{about}](images/{name}.png)", ""]


def sweep_part(docs: Path, run: dict[str, Any]) -> list[str]:
    entries, g = run["guidances"], run["generation"]
    title, n = entries[0]["metrics"]["frechet"]["title"], entries[0]["n"]
    count = len(best_first(entries, known(entries, USUAL)))
    about = (
        f"{len(entries) - 1} combinations of scale and interval, and no guidance: {n:,} images each on the same seeds and "
        f"classes, {g['steps']} steps of `{g['sampler']}`. {count} are on the Pareto front of {title}, recall and evaluations: "
        "no other one is at least as good in all three and better in one."
    )
    lines = ["## Sweep", "", made_with(run), "", *shown(commands(n, 1, OUT)["sweep"]), about, "", *table(entries), ""]
    for name in ("frechet", "recall"):
        lines += [f"{entries[0]['metrics'][name]['title']}, all combinations:", "", *matrix(entries, name), ""]
    lines += plot(docs, entries, "nfe", "sweep_fd_nfe", f"{title} against NFE")
    return lines + plot(docs, entries, "recall", "sweep_fd_recall", f"{title} against recall")


def tune_part(docs: Path, run: dict[str, Any]) -> list[str]:
    entries = run["guidances"]
    about = (
        f"{len(entries)} trials, {sum(entry['n'] for entry in entries):,} images in all. Each trial is a guidance of the run, so "
        "the run folder, its report and `genkit-eval compare` are those of a sweep. Values are chosen by optuna's TPE sampler "
        "from a seed and the trials before: the search can be repeated, and stopped at any time. Its front:"
    )
    command = commands(entries[0]["n"], len(entries), OUT)["tune"]
    lines = ["## Tune", "", made_with(run), "", *shown(command), about, "", *table(entries), ""]
    return lines + plot(docs, entries, "nfe", "sweep_tune", f"{entries[0]['metrics']['frechet']['title']} against NFE, tuned")


def page(docs: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Write docs/sweep.md and its images."""
    ways = sorted({metric["variant"] for run in runs.values() for metric in run["guidances"][0]["metrics"].values()})
    n = runs["sweep"]["guidances"][0]["n"]
    lines = [
        "# Sweeps and tuning",
        "",
        "This page is written by `python benchmarks/sweep_page.py` from `docs/runs/sweep.json` and `docs/runs/tune.json`; "
        "`genkit-eval report docs/runs/sweep.json docs/runs/tune.json --html merged.html` makes one report of both. Small "
        f"figures are 95 % bootstrap intervals: {n:,} images are few, and a distance of so few is biased upwards.",
        "",
        *sweep_part(docs, runs["sweep"]),
        *tune_part(docs, runs["tune"]),
        f"Protocols: {', '.join(ways)}.",
        "",
    ]
    (docs / "sweep.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--trials", type=int, default=24, help="what the budget of the search is enough for")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where page, run files and images are kept")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    args = parser.parse_args()
    for name, command in commands(args.num_samples, args.trials, args.out).items():
        if not args.page:
            subprocess.run([sys.executable, "-m", "genkit_eval", *command], check=True)
            keep(args.docs / "runs" / f"{name}.json", read(args.out / name), "sweep_page.py", args.num_samples)
    page(args.docs, {name: read_run(args.docs / "runs" / f"{name}.json").results for name in ("sweep", "tune")})


if __name__ == "__main__":
    main()
