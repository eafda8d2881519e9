"""From a run folder to ``report.html``: one file, no request to anywhere."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from genkit_eval.errors import InputError
from genkit_eval.files import read_json, write_bytes
from genkit_eval.report import plots
from genkit_eval.results import RESULTS, SCHEMA
from genkit_eval.table import columns_of, metric_order

TEMPLATE = "template.html.j2"


def inline(png: bytes) -> str:
    """A PNG as a data address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def figures(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The plots that the entries have numbers for: title, sentence, image."""
    has = {name for name in entries[0]["metrics"] if all(name in entry["metrics"] for entry in entries)}
    found = []
    if "frechet" in has and all("cost" in entry for entry in entries):
        title = entries[0]["metrics"]["frechet"]["title"]
        text = "Lower and further left is better: a smaller distance for fewer evaluations. Bars are 95 % intervals."
        found.append({"title": f"{title} against NFE", "text": text, "image": inline(plots.against(entries, "nfe", "frechet"))})
    if {"precision", "recall"} <= has:
        text = "Stronger guidance usually moves right (fidelity) and down (variety)."
        found.append(
            {"title": "Recall against precision", "text": text, "image": inline(plots.against(entries, "precision", "recall"))}
        )
    traced = plots.traces(entries) if all("trace" in entry for entry in entries) else None
    if traced is not None:
        text = "Means over the first block. A method saves evaluations where it uses one network row per image and not two."
        found.append({"title": "What guidance did at each noise level", "text": text, "image": inline(traced)})
    return found


def pictures(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The image grids that exist: the comparison on equal seeds, then one per guidance."""
    compare = [
        ("Same seed, same class", "One column per image: only the guidance differs between rows.", folder / "compare.png", "wide")
    ]
    grids = [
        (entry["label"], f"{entry['n']:,} images scored; the first of each class.", folder / entry["grid"], "")
        for entry in entries
    ]
    return [
        {"title": title, "text": text, "image": inline(path.read_bytes()), "kind": kind}
        for title, text, path, kind in [*compare, *grids]
        if path.exists()
    ]


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value))]


def differences(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each guidance after the first: (title, difference, interval, whether the interval leaves out zero) of each metric."""
    rows = []
    for entry in entries[1:]:
        cells = []
        for metric in (entry["metrics"][name] for name in metric_order(entry["metrics"])):
            gap = metric.get("difference")
            if gap is not None:
                low, high = gap["interval"]
                clear = "" if low <= 0 <= high or metric["better"] == "neither" else _verdict(gap["value"], metric["better"])
                cells.append({"title": metric["title"], "value": gap["value"], "low": low, "high": high, "verdict": clear})
        if cells:
            rows.append({"label": entry["label"], "cells": cells})
    return rows


def _verdict(value: float, better: str) -> str:
    return "better" if (value < 0) == (better == "lower") else "worse"


def render(results: dict[str, Any], folder: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("genkit_eval", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    entries = results["guidances"]
    about = {key: results[key] for key in ("command", "date", "status", "generation", "extractor", "reference", "bootstrap")}
    about |= {key: results[key] for key in ("versions", "git", "hardware")}
    return environment.get_template(TEMPLATE).render(
        results=results,
        entries=entries,
        columns=columns_of(entries),
        figures=figures(entries),
        pictures=pictures(folder, entries),
        differences=differences(entries),
        provenance=flat(about),
        colour=plots.colour,
    )


def build_report(folder: Path) -> Path:
    """Write ``<folder>/report.html`` from ``results.json`` and the grids beside it; InputError when there is none."""
    results = read_json(folder / RESULTS, "RUN")
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or not results.get("guidances"):
        raise InputError("RUN", f"{folder / RESULTS} is not a results file of this version ({SCHEMA}) with at least one guidance")
    path = folder / "report.html"
    write_bytes(path, render(results, folder).encode())
    return path
