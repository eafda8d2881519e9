"""Plots as PNG bytes, drawn without pyplot's global state."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")


MARKERS = "osD^vPX*"


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
    """Scatter of metric ``up`` over metric ``across`` ("nfe" for evaluations), with 95 % bars and one marker per guidance."""
    figure = Figure(figsize=(6.2, 4.0 + 0.08 * max(0, len(entries) - 5)), layout="constrained")  # room for the legend
    ax = figure.subplots()
    for index, entry in enumerate(entries):
        x, x_bar = _point(entry, across)
        y, y_bar = _point(entry, up)
        style = {"fmt": marker(index), "color": colour(index), "label": entry["label"]}
        ax.errorbar([x], [y], xerr=x_bar, yerr=y_bar, ms=7, capsize=3, lw=1.2, **style)
    ax.set_xlabel(_title(entries, across))
    ax.set_ylabel(_title(entries, up))
    _plain(ax)
    ax.margins(0.12)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1 if len(entries) < 4 else 2)
    return _png(figure)


def _point(entry: dict[str, Any], name: str) -> tuple[float, list[list[float]] | None]:
    if name == "nfe":
        return entry["cost"]["nfe_mean"], None
    metric = entry["metrics"][name]
    value, limits = metric["value"], metric["interval"]
    return value, None if limits is None else [[max(value - limits[0], 0.0)], [max(limits[1] - value, 0.0)]]


def _title(entries: list[dict[str, Any]], name: str) -> str:
    return "network evaluations per image (NFE)" if name == "nfe" else str(entries[0]["metrics"][name]["title"])


TRACED = {
    "weight": "guidance weight",
    "cosine": "cosine of cond. and uncond.",
    "share": "network rows per image",
}


def traces(entries: list[dict[str, Any]]) -> bytes | None:
    """Weight, cosine and rows over sigma for the first block of each guidance; None when nothing was traced."""
    quantities = [q for q in TRACED if any(_series(entry, q)[0] for entry in entries)]
    if not quantities:
        return None
    figure = Figure(figsize=(6.2, 2.3 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    for ax, quantity in zip(axes, quantities, strict=True):
        for index, entry in enumerate(entries):
            sigma, values = _series(entry, quantity)
            # Thinner towards the last, so that lines which coincide stay visible.
            width = max(1.0, 4.0 - 0.7 * index)
            style = "default" if quantity == "cosine" else "steps-mid"
            shown = {"marker": marker(index), "color": colour(index), "label": entry["label"], "drawstyle": style}
            ax.plot(sigma, values, ms=3, lw=width, alpha=0.85, **shown)
        ax.set_ylabel(TRACED[quantity], fontsize=9)
        ax.set_xscale("log")
        _plain(ax)
    axes[0].invert_xaxis()
    axes[-1].set_xlabel("sigma (noise level; sampling runs from left to right)")
    axes[-1].legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=1 if len(entries) < 4 else 2)
    return _png(figure)


def _series(entry: dict[str, Any], quantity: str) -> tuple[list[float], list[float]]:
    """(sigma, value) of the first evaluation of each step."""
    rows = [row for row in entry["trace"] if row.get("stage", "step") == "step" and row.get("sigma")]
    if quantity == "share":
        points = [(row["sigma"], row["rows"] / row["images"]) for row in rows if row.get("rows") and row.get("images")]
    else:
        points = [(row["sigma"], row[quantity]) for row in rows if row.get(quantity) is not None]
    return [p[0] for p in points], [p[1] for p in points]
