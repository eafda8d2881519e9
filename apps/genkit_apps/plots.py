"""Pictures of numbers: figures of matplotlib as SVG, and the token grid, as HTML with a text that says what they show.

Figures are made without pyplot, whose state all threads share.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL.Image import Image

COLOURS = ("#4269d0", "#d97706", "#dc2626", "#0f766e", "#3ca951", "#db2777", "#7c3aed", "#0284c7", "#9c6b4e", "#64748b")
MARKERS = "osD^vPX*"
#: Points beyond which those off the Pareto front are small, and stand without a name.
MANY = 12
_WIDTH = 4.9  # inches: text stays legible when a phone shrinks the picture


def colour(index: int) -> str:
    """Colour of entry ``index``, the same in every picture."""
    return COLOURS[index % len(COLOURS)]


def png(image: Image) -> str:
    """The image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def picture(image: Image, caption: str, alt: str, width: int = 340) -> str:
    """The image with a caption, as HTML with its data inside, so that no file has to be served.

    Args:
        alt: what it shows.
        width: in pixels, at most; small images are enlarged without smoothing.
    """
    crisp = ";image-rendering:pixelated" if max(image.size) < width else ""
    style = f"display:block;width:100%;max-width:{width}px;height:auto;border-radius:6px{crisp}"
    told = f'<figcaption style="font-size:.85rem;padding-bottom:.25rem">{html.escape(caption)}</figcaption>'
    shown_ = f'<img style="{style}" alt="{html.escape(alt)}" src="data:image/png;base64,{png(image)}">'
    return f'<figure style="margin:0;max-width:{width}px">{told}{shown_}</figure>'


def shown(figure: Figure, alt: str) -> str:
    """The figure as an ``<img>`` with the text ``alt``."""
    return _img("image/svg+xml", _svg(figure).encode(), alt)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _img(kind: str, content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode()
    style = "width:100%;max-width:760px;height:auto;background:#fff;border-radius:6px"
    return f'<img class="gk-plot" style="{style}" alt="{html.escape(alt)}" src="data:{kind};base64,{data}">'


def _plain(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


# What a trajectory tells of each step: column of the trace, name of the axis, whether it holds between steps.
TRACED = (
    ("weight", "guidance\nweight", True),
    ("cosine", "cosine of\nthe branches", False),
    ("update_norm", "norm of\nthe update", False),
    ("rows", "evaluations", True),
)


@dataclass(frozen=True)
class Traced:
    """The plots of a trajectory, drawn once; :meth:`marked` puts band and line into them, which costs next to nothing.

    Attributes:
        svg: the picture.
        boxes: of the plots, (left, top, width, height) in its coordinates.
        ends: noise levels at the left and at the right end of the axis.
    """

    svg: str
    boxes: tuple[tuple[float, float, float, float], ...]
    ends: tuple[float, float]

    def marked(
        self, alt: str, interval: tuple[float, float] | None = None, at: float | None = None, pending: bool = False
    ) -> str:
        """The picture as an ``<img>``.

        Args:
            alt: what it shows.
            interval: of noise levels in which guidance acts; drawn as a band.
            at: noise level of the step that is looked at; drawn as a line.
            pending: the interval was changed and the run not yet repeated: the band only has its outline.
        """
        parts = []
        for left, top, width, height in self.boxes:
            if interval is not None:
                start, stop = (left + width * self._share(level) for level in reversed(interval))
                fill = 'fill="none" stroke="#4269d0" stroke-dasharray="4 3"' if pending else 'fill="#4269d0" fill-opacity=".14"'
                parts.append(f'<rect x="{start:.1f}" y="{top:.1f}" width="{stop - start:.1f}" height="{height:.1f}" {fill}/>')
            if at is not None:
                x = left + width * self._share(at)
                parts.append(
                    f'<path d="M{x:.1f} {top:.1f}v{height:.1f}" stroke="#1e293b" stroke-width="1.2" stroke-dasharray="5 2"/>'
                )
        return _img("image/svg+xml", self.svg.replace("</svg>", "".join(parts) + "</svg>").encode(), alt)

    def _share(self, level: float) -> float:
        first, last = (math.log(end) for end in self.ends)
        place = first if level == math.inf else math.log(level) if level > 0 else last
        return min(max((first - place) / (first - last), 0.0), 1.0)


def trajectory(rows: Sequence[dict[str, Any]]) -> Traced:
    """The trace of one image over the noise level, sampling from left to right.

    Args:
        rows: of ``Trace.rows``, evaluations of one step added up by :func:`steps_of`.
    """
    figure = Figure(figsize=(_WIDTH, 1.2 * len(TRACED) + 0.5))
    figure.subplots_adjust(0.19, 0.09, 0.985, 0.99, hspace=0.12)  # a layout that is computed takes several times as long
    axes = figure.subplots(len(TRACED), 1, sharex=True)
    levels = [row["sigma"] for row in rows if 0 < row["sigma"] < math.inf]
    ends = (max(levels) * 1.4, min(levels) / 1.4) if levels else (80.0, 0.002)
    for number, (ax, (column, title, held)) in enumerate(zip(axes, TRACED, strict=True)):
        points = [(min(row["sigma"], ends[0]), row[column]) for row in rows if row.get(column) is not None]
        if points:
            style = "steps-mid" if held else "default"
            ax.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.5, drawstyle=style, color=colour(number))
        else:
            ax.text(0.5, 0.5, "not measured: one branch only", transform=ax.transAxes, ha="center", va="center", fontsize=8)
        ax.set_ylabel(title, fontsize=8)
        ax.ticklabel_format(axis="y", useOffset=False)
        _plain(ax)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_minor_locator(NullLocator())  # most of the time would go into drawing them
    axes[0].xaxis.set_major_formatter(lambda level, _: f"{level:g}")
    axes[0].set_xlim(*ends)
    axes[-1].set_xlabel("sigma: noise level at the beginning of the step", fontsize=9)
    svg = _svg(figure)
    width, height = (72 * inches for inches in figure.get_size_inches())
    places = [ax.get_position() for ax in axes]
    boxes = tuple(
        (float(p.x0 * width), float((1 - p.y1) * height), float(p.width * width), float(p.height * height)) for p in places
    )
    return Traced(svg, boxes, ends)


def steps_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step, in order: its first evaluation, with the evaluations of all its stages added up."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["stage"] == "step" or not found:
            found.append(dict(row))
        else:
            found[-1]["rows"] += row["rows"]
    return found


@dataclass(frozen=True)
class Point:
    """A point of a Pareto plot; intervals where they are known; ``number`` as in the table beside it."""

    number: int
    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    on_front: bool = False


def pareto(points: Sequence[Point], x_title: str, y_title: str, x_lower: bool) -> Figure:
    """Scatter with 95 % bars and the front. Of more than ``MANY`` points only those on the front have bars and names.

    Args:
        x_lower: whether less is better across.
    """
    named = [point for point in points if point.on_front or len(points) <= MANY]
    figure = Figure(figsize=(_WIDTH, 3.8 + 0.17 * len(named)), layout="constrained")
    ax = figure.subplots()
    front = sorted((point.x, point.y) for point in points if point.on_front)
    if len(front) > 1:
        style = "steps-post" if x_lower else "steps-pre"
        ax.plot(*zip(*front, strict=True), drawstyle=style, color="0.6", lw=1.0, ls="--", zorder=0)
    for point in points:
        index = point.number - 1
        look: dict[str, Any] = {"fmt": MARKERS[index // len(COLOURS) % len(MARKERS)], "color": colour(index)}
        if point not in named:
            ax.errorbar([point.x], [point.y], ms=4, alpha=0.45, **look)
            continue
        bars: dict[str, Any] = {"xerr": _bar(point.x, point.x_interval), "yerr": _bar(point.y, point.y_interval)}
        ax.errorbar([point.x], [point.y], **bars, ms=6, capsize=3, lw=1.0, label=f"{point.number}: {point.label}"[:70], **look)
        ax.annotate(str(point.number), (point.x, point.y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    ax.set_xlabel(x_title, fontsize=9)
    ax.set_ylabel(y_title, fontsize=9)
    ax.margins(0.12)
    _plain(ax)
    if named:
        ax.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.16), ncols=1)
    return figure


def _bar(value: float, limits: tuple[float, float] | None) -> list[list[float]] | None:
    return None if limits is None else [[max(value - limits[0], 0.0)], [max(limits[1] - value, 0.0)]]


# Light to dark with the accepted length; text on each keeps a contrast of 4.5.
_LENGTHS = ("#e2e8f0", "#bae6fd", "#7dd3fc", "#38bdf8", "#0369a1", "#1e40af", "#312e81", "#1e1b4b")


def passes_of(counts: Sequence[int]) -> list[int]:
    """For each token the number of the pass that settled it, from how many tokens there were after each pass."""
    found: list[int] = []
    for number, count in enumerate(counts):
        found.extend([number] * (count - len(found)))
    return found


def token_map(passes: Sequence[int], side: int) -> str:
    """The token grid: one cell for each token, with the number of the pass that settled it, coloured by how many that pass gave.

    Args:
        passes: for each token so far, the number of its pass, from 0.
        side: tokens in a row.
    """
    sizes: dict[int, int] = {}
    for number in passes:
        sizes[number] = sizes.get(number, 0) + 1
    cell = 20
    parts = []
    for place, number in enumerate(passes):
        x, y = place % side * cell, place // side * cell
        shade = min(sizes[number], len(_LENGTHS)) - 1
        ink = "#0f172a" if shade < 4 else "#ffffff"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{_LENGTHS[shade]}"/>'
            f'<text x="{x + cell / 2}" y="{y + 13.5}" font-size="9" text-anchor="middle" fill="{ink}">{number + 1}</text>'
        )
        if place % side and passes[place - 1] != number:  # where a new pass begins
            parts.append(f'<path d="M{x} {y}v{cell}" stroke="#0f172a" stroke-width="1.6"/>')
    size, across = cell * -(-max(len(passes), side * side) // side), cell * side
    legend = _legend(max(sizes.values(), default=1), size)
    told = (
        f"{len(passes)} of {side * side} tokens by {len(sizes)} passes of the network"
        if passes
        else f"a grid of {side} by {side} tokens, none drawn yet"
    )
    frame = f'<rect x=".5" y=".5" width="{across - 1}" height="{size - 1}" fill="none" stroke="#94a3b8"/>'
    return (
        f'<svg class="gk-token-map" role="img" aria-label="{told}" viewBox="0 0 {across} {size + 26}" '
        'style="width:100%;max-width:340px;height:auto;background:#fff;border-radius:6px;font-family:sans-serif">'
        f"{''.join(parts)}{frame}{legend}</svg>"
    )


def _legend(longest: int, top: int) -> str:
    """The shades and what they mean."""
    parts = [f'<text x="0" y="{top + 17}" font-size="7" fill="#0f172a">tokens of a pass</text>']
    for n in range(1, min(max(longest, 2), len(_LENGTHS)) + 1):
        x, ink = 58 + (n - 1) * 13, "#0f172a" if n < 5 else "#ffffff"
        more = "+" if n == len(_LENGTHS) < longest else ""
        parts.append(
            f'<rect x="{x}" y="{top + 8}" width="12" height="12" fill="{_LENGTHS[n - 1]}" stroke="#94a3b8" stroke-width=".4"/>'
        )
        parts.append(f'<text x="{x + 6}" y="{top + 16.8}" font-size="7.5" text-anchor="middle" fill="{ink}">{n}{more}</text>')
    return "".join(parts)


__all__ = ["Point", "Traced", "colour", "pareto", "passes_of", "picture", "png", "shown", "steps_of", "token_map", "trajectory"]
