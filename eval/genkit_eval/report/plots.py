"""Plots as PNG bytes, drawn without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from genkit_eval.pareto import COSTS, better_of, front, title_of

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")


MARKERS = "osD^vPX*"
#: Guidances beyond which plots and pictures show the best alone.
MANY = 12


def colour(index: int) -> str:
    """Colour of guidance ``index``, the same in every plot."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Marker of guidance ``index``: another one whenever the colours begin anew."""
    return MARKERS[index // len(COLOURS) % len(MARKERS)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _plain(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def against(entries: list[dict[str, Any]], across: str, up: str) -> bytes:
    """Scatter of metric ``up`` over metric ``across`` ("nfe" for evaluations), with 95 % bars and the Pareto front drawn.

    One marker per guidance; of more than ``MANY`` only those on the front have bars and stand in the legend.
    """
    on = front(entries, (across, up))
    named = [whole or len(entries) <= MANY for whole in on]
    figure = Figure(figsize=(6.2, 4.0 + 0.08 * max(0, sum(named) - 5)), layout="constrained")  # room for the legend
    ax = figure.subplots()
    _draw_front(ax, [entry for entry, best in zip(entries, on, strict=True) if best], across, up)
    for index, entry in enumerate(entries):
        x, x_bar = _point(entry, across)
        y, y_bar = _point(entry, up)
        style: dict[str, Any] = {"fmt": marker(index), "color": colour(index)}
        if named[index]:
            ax.errorbar([x], [y], xerr=x_bar, yerr=y_bar, ms=7, capsize=3, lw=1.2, label=entry["label"], **style)
        else:
            ax.errorbar([x], [y], ms=4, alpha=0.45, **style)
    ax.set_xlabel(_title(entries, across))
    ax.set_ylabel(_title(entries, up))
    _plain(ax)
    ax.margins(0.12)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1 if sum(named) < 4 else 2)
    return _png(figure)


def _draw_front(ax: Axes, best: list[dict[str, Any]], across: str, up: str) -> None:
    """The border of what is reached: between two entries of the front, the better of both that reaches as far."""
    if len(best) < 2:
        return
    points = sorted((_point(entry, across)[0], _point(entry, up)[0]) for entry in best)
    style = "steps-post" if better_of(best, across) == "lower" else "steps-pre"
    ax.plot(*zip(*points, strict=True), drawstyle=style, color="0.6", lw=1.0, ls="--", zorder=0)


def _point(entry: dict[str, Any], name: str) -> tuple[float, list[list[float]] | None]:
    if name in COSTS:
        return entry["cost"][COSTS[name][0]], None
    metric = entry["metrics"][name]
    value, limits = metric["value"], metric["interval"]
    return value, None if limits is None else [[max(value - limits[0], 0.0)], [max(limits[1] - value, 0.0)]]


def _title(entries: list[dict[str, Any]], name: str) -> str:
    return "network evaluations per image (NFE)" if name == "nfe" else title_of(entries, name)


def distributions(samples: dict[str, list[float]], axis: str, marks: Sequence[float] = ()) -> bytes:
    """Smoothed densities of one quantity, a line for each name; ``marks`` are drawn as thin vertical lines."""
    figure = Figure(figsize=(6.2, 4.0 + 0.08 * max(0, len(samples) - 5)), layout="constrained")
    ax = figure.subplots()
    values = np.concatenate([np.asarray(found) for found in samples.values()])
    grid = np.linspace(values.min(), np.quantile(values, 0.999), 300)
    for mark in marks:
        if grid[0] < mark < grid[-1]:
            ax.axvline(mark, color="0.85", lw=0.8, zorder=0)
    for index, (name, found) in enumerate(samples.items()):
        ax.plot(grid, gaussian_kde(found)(grid), color=colour(index), lw=1.6, label=name)
    ax.set_xlabel(axis)
    ax.set_ylabel("density")
    _plain(ax)
    ax.grid(False, axis="x")  # vertical lines are marks
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1 if len(samples) < 4 else 2)
    return _png(figure)


TRACED = {
    "weight": "guidance weight",
    "cosine": "cosine of cond. and uncond.",
    "share": "network rows per image",
}


def traces(entries: list[dict[str, Any]], shown: Sequence[bool]) -> bytes | None:
    """Weight, cosine and rows over sigma for the first block of each guidance ``shown``; None when nothing was traced.

    Over the steps where there are no noise levels, as with tokens.
    """
    lines = [(number, entry) for number, (entry, draw) in enumerate(zip(entries, shown, strict=True)) if draw]
    along = "sigma" if any(row.get("sigma") for entry in entries for row in entry["trace"]) else "step"
    quantities = [q for q in TRACED if any(_series(entry, q, along)[0] for entry in entries)]
    if not quantities:
        return None
    figure = Figure(figsize=(6.2, 2.3 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    for ax, quantity in zip(axes, quantities, strict=True):
        for index, entry in lines:
            places, values = _series(entry, quantity, along)
            # Thinner towards the last, so that lines which coincide stay visible.
            width = max(1.0, 4.0 - 0.7 * index)
            style = "default" if quantity == "cosine" else "steps-mid"
            look: dict[str, Any] = {"marker": marker(index), "color": colour(index), "drawstyle": style}
            ax.plot(places, values, ms=3, lw=width, alpha=0.85, label=entry["label"], **look)
        ax.set_ylabel(TRACED[quantity], fontsize=9)
        ax.set_xscale("log" if along == "sigma" else "linear")
        _plain(ax)
    if along == "sigma":
        axes[0].invert_xaxis()
    axes[-1].set_xlabel("sigma (noise level; sampling runs from left to right)" if along == "sigma" else "step")
    axes[-1].legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=1 if len(lines) < 4 else 2)
    return _png(figure)


def _series(entry: dict[str, Any], quantity: str, along: str) -> tuple[list[float], list[float]]:
    """(place, value) of the first evaluation of each step; ``along`` is ``"sigma"`` or ``"step"``."""
    rows = [row for row in entry["trace"] if row.get("stage", "step") == "step" and (row.get("sigma") or along == "step")]
    if quantity == "share":
        points = [(row[along], row["rows"] / row["images"]) for row in rows if row.get("rows") and row.get("images")]
    else:
        points = [(row[along], row[quantity]) for row in rows if row.get(quantity) is not None]
    return [p[0] for p in points], [p[1] for p in points]
