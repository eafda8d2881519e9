"""From run folders to one page: one HTML file, no request to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit_eval.compare import Side, compare, why_unpaired
from genkit_eval.files import write_bytes
from genkit_eval.pareto import USUAL, front, known, title_of
from genkit_eval.report import plots
from genkit_eval.results import warnings_of
from genkit_eval.runs import Run, check_one_protocol, labelled, read_run
from genkit_eval.table import columns_of, metric_order

TEMPLATE = "template.html.j2"
#: Plots of two quantities: across, up, and what to look for.
PLOTS = (
    ("nfe", "frechet", "Lower and further left is better: a smaller distance for fewer evaluations."),
    ("recall", "frechet", "Lower and further right is better: a smaller distance with more of the variety kept."),
    ("precision", "recall", "Stronger guidance usually moves right (fidelity) and down (variety)."),
)
NOT_ABOUT = ("schema", "warnings", "guidances")


def inline(png: bytes) -> str:
    """A PNG as a data address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def best_of(entries: list[dict[str, Any]]) -> list[bool]:
    """Whether each entry is on the Pareto front of distance, recall and evaluations, as far as these are known."""
    names = known(entries, USUAL)
    return front(entries, names) if len(names) > 1 and len(entries) > 1 else [False] * len(entries)


def shown_of(entries: list[dict[str, Any]]) -> list[bool]:
    """Whether each entry has pictures and lines: all of a few; of many, the first and those on the front."""
    if len(entries) <= plots.MANY:
        return [True] * len(entries)
    return [on or number == 0 for number, on in enumerate(best_of(entries))]


def figures(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The plots that the entries have numbers for: title, sentence, image."""
    found = []
    for across, up, text in PLOTS:
        if len(known(entries, (across, up))) == 2:
            title = f"{title_of(entries, up)} against {title_of(entries, across)}"
            text = f"{text} Bars are 95 % intervals, the dashed line is the front."
            found.append({"title": title, "text": text, "image": inline(plots.against(entries, across, up))})
    traced = plots.traces(entries, shown_of(entries)) if all("trace" in entry for entry in entries) else None
    if traced is not None:
        text = "Means over the first block. A method saves evaluations where it uses one network row per image and not two."
        found.append({"title": "What guidance did at each noise level", "text": text, "image": inline(traced)})
    return found


def pictures(runs: Sequence[Run], pairs: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[str, str]]:
    """The image grids that exist: the comparison on equal seeds of each run, then one per guidance."""
    text = "One column per image: only the guidance differs between rows."
    name = "Same seed, same class"
    found = [(f"{name}: {r.name}" if len(runs) > 1 else name, text, r.folder / "compare.png", "wide") for r in runs]
    for (run, entry), shown in zip(pairs, shown_of([entry for _, entry in pairs]), strict=True):
        text = f"{entry['n']:,} images scored; the first of each class."
        found += [(entry["label"], text, run.folder / entry["grid"], "")] if shown else []
    return [
        {"title": title, "text": text, "image": inline(path.read_bytes()), "kind": kind}
        for title, text, path, kind in found
        if path.exists()
    ]


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value))]


def differences(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each guidance after the first: (title, difference, interval, whether the interval leaves out zero) of each metric."""
    names = metric_order({name for entry in entries for name, m in entry["metrics"].items() if m.get("difference")})
    rows = []
    for entry in entries[1:]:
        gaps = [(entry["metrics"].get(name, {}).get("difference"), entry["metrics"].get(name)) for name in names]
        if any(gap for gap, _ in gaps):
            rows.append({"label": entry["label"], "cells": [_gap(gap, metric) if gap else None for gap, metric in gaps]})
    return [{"titles": [title_of(entries, name) for name in names], "rows": rows}] if rows else []


def _gap(gap: dict[str, Any], metric: dict[str, Any]) -> dict[str, Any]:
    low, high = gap["interval"]
    clear = "" if low <= 0 <= high or metric["better"] == "neither" else _verdict(gap["value"], metric["better"])
    return {"value": gap["value"], "low": low, "high": high, "verdict": clear}


def _verdict(value: float, better: str) -> str:
    return "better" if (value < 0) == (better == "lower") else "worse"


def _pair_with_first(pairs: Sequence[tuple[Run, dict[str, Any]]]) -> None:
    """Give entries of several runs their differences to the very first one, where both have the same seeds and resamples."""
    first = Side(*pairs[0])
    for run, entry in pairs:
        side = Side(run, entry)
        found = {} if entry is first.entry or why_unpaired(first, side) else {c.name: c for c in compare(first, side)}
        for name, metric in entry["metrics"].items():
            change = found.get(name)
            metric["difference"] = {"value": change.change, "interval": change.interval} if change and change.paired else None


def _agreed(values: Sequence[Any]) -> str:
    return str(values[0]) if all(value == values[0] for value in values) else "several, see below"


def facts(runs: Sequence[Run], entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What stands under the heading: (name, text)."""
    references = [run.results["reference"] for run in runs]
    counts = [
        f"number of images {r['num_images']}" if isinstance(r["num_images"], str) else f"{r['num_images']:,} images"
        for r in references
    ]
    made = [(run.results["generation"]["sampler"], run.results["generation"]["steps"]) for run in runs]
    sampler = ("Sampler", _agreed([f"{name}, {steps} steps" for name, steps in made]))
    return [
        ("Images each", _agreed([f"{entry['n']:,}" for entry in entries])),
        *([sampler] if any("cost" in entry for entry in entries) else []),
        ("Reference", _agreed([f"{r['dataset']}, {count}" for r, count in zip(references, counts, strict=True)])),
        ("Date", _agreed([run.results["date"] for run in runs])),
    ]


def provenance_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Everything that the results files say beside the numbers, as (name, text)."""
    found = []
    for run in runs:
        about = {key: value for key, value in run.results.items() if key not in NOT_ABOUT}
        found += flat({run.name: about} if len(runs) > 1 else about)
    return found


def render(runs: Sequence[Run]) -> str:
    """The page as text. InputError for runs whose numbers follow different protocols."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    check_one_protocol(runs)
    pairs = labelled(runs)
    entries = [entry for _, entry in pairs]
    if len(runs) > 1:
        _pair_with_first(pairs)
    environment = Environment(
        loader=PackageLoader("genkit_eval", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        model=_agreed([run.results["generation"]["model"] for run in runs]),
        extractor=_agreed([run.results["extractor"]["name"] for run in runs]),
        runs=len(runs),
        shared=not any(why_unpaired(Side(*pairs[0]), Side(*pair)) for pair in pairs),
        unfinished=[run.name for run in runs if run.results["status"] != "complete"],
        generated=any("cost" in entry for entry in entries),
        facts=facts(runs, entries),
        warnings=runs[0].results["warnings"] if len(runs) == 1 else warnings_of(entries),
        entries=entries,
        best=best_of(entries),
        columns=columns_of(entries),
        figures=figures(entries),
        pictures=pictures(runs, pairs),
        differences=differences(entries),
        provenance=provenance_of(runs),
        colour=plots.colour,
    )


def build_report(folder: Path) -> Path:
    """Write ``<folder>/report.html`` from ``results.json`` and the grids beside it; InputError when there is none."""
    path = folder / "report.html"
    write_bytes(path, render([read_run(folder)]).encode())
    return path
