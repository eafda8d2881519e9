"""The table of results: the same columns on the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from genkit_eval.metrics import METRICS

# FD-like numbers need four digits, fractions three decimals.
ORDER = ("frechet", "kid", "precision", "recall", "density", "coverage", "saturation", "contrast", "clipped")


@dataclass(frozen=True)
class Cell:
    """A number as text, its interval as text (empty for none), and the number itself for sorting; None where it is not known."""

    text: str
    interval: str = ""
    number: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A heading, what hovering over it tells, and the cell of each entry."""

    title: str
    hint: str
    cells: tuple[Cell, ...]
    arrow: str = ""


def format_number(value: float) -> str:
    """Four significant digits, three decimals at most for numbers below one, none lost to an exponent where it can be avoided."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    if abs(value) < 10:
        return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def _metric_column(name: str, entries: list[dict[str, Any]]) -> Column:
    found = [entry["metrics"].get(name) for entry in entries]
    some = next(metric for metric in found if metric)
    better: Callable[..., float] | None = {"lower": min, "higher": max}.get(some["better"])
    values = [metric["value"] for metric in found if metric]
    best = better(values) if better is not None and len(values) > 1 else math.nan
    cells = []
    for metric in found:
        if not metric:
            cells.append(Cell("-"))
            continue
        limits = metric["interval"]
        shown = "" if limits is None else f"{format_number(limits[0])} to {format_number(limits[1])}"
        cells.append(Cell(format_number(metric["value"]), shown, metric["value"], metric["value"] == best))
    hint = f"{some['variant']}; 95 % interval over {some['interval_of']}"
    return Column(some["title"], hint, tuple(cells), {"lower": "↓", "higher": "↑"}.get(some["better"], ""))


def columns_of(entries: list[dict[str, Any]]) -> list[Column]:
    """All columns: the first metric, what it cost, then the other metrics."""
    names = {name for entry in entries for name in entry["metrics"]}
    columns = [_metric_column(name, entries) for name in metric_order(names)]
    costs = [entry["cost"] for entry in entries if "cost" in entry]
    if len(costs) < len(entries):  # images that were found have no known cost
        return columns
    nfe = tuple(Cell(f"{c['nfe_mean']:.1f}", _spread(c), c["nfe_mean"]) for c in costs)
    wall = tuple(
        Cell(format_number(c["seconds_wall"]), f"CPU {format_number(c['seconds_cpu'])}", c["seconds_wall"]) for c in costs
    )
    spent = [
        Column("NFE", "network evaluations per image, mean; range over the images", nfe),
        Column("s/image", "seconds of generation per image: wall clock, and CPU seconds over all cores", wall),
    ]
    return [*columns[:1], *spent, *columns[1:]]


def metric_order(names: Iterable[str]) -> list[str]:
    """Names of metrics as the tables show them: the usual ones first, then others as registered, then unknown ones.

    One over a part of the extractor, ``frechet@dinov2``, follows the one over the whole.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys([*ORDER, *METRICS]))}
    return sorted(set(names), key=lambda name: (places.get(name.partition("@")[0], len(places)), name))


def _spread(cost: dict[str, Any]) -> str:
    return "" if cost["nfe_min"] == cost["nfe_max"] else f"{cost['nfe_min']} to {cost['nfe_max']}"


def text_table(results: dict[str, Any]) -> str:
    """Aligned plain text, one line per guidance; ``*`` marks the best of a column."""
    entries = results["guidances"]
    rows = [["guidance" if "cost" in entries[0] else "images"], *([entry["label"]] for entry in entries)]
    for column in columns_of(entries):
        wide = column.title.startswith(("FD", "FID"))
        rows[0].append(f"{column.title}{' [95 % interval]' if wide else ''}")
        for row, cell in zip(rows[1:], column.cells, strict=True):
            star = "*" if cell.best else " "
            row.append(f"{cell.text}{star}[{cell.interval}]" if wide and cell.interval else f"{cell.text}{star}")
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first row is underlined, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
