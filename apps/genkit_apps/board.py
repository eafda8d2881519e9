"""The comparison as HTML: one column for each guidance, the same seeds in the same row."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as PIL
from PIL.Image import Image

from genkit_apps.generation import Column, Request

#: Larger images are shown reduced; the download has them whole.
LARGEST = 256
#: Smaller ones are enlarged without smoothing.
SMALLEST = 128


def picture(image: Image, alt: str) -> str:
    """An <img> with its data inside, so that no file has to be served."""
    small = image.convert("RGB")
    if max(small.size) > LARGEST:
        small = small.copy()
        small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    if max(small.size) <= SMALLEST:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "WEBP", quality=88)
    kind = "png" if max(small.size) <= SMALLEST else "webp"
    data = base64.b64encode(buffer.getvalue()).decode()
    crisp = ' class="gk-crisp"' if max(image.size) <= SMALLEST else ""
    return f'<img{crisp} alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def difference(image: Image, first: Image, gain: float) -> tuple[Image, float]:
    """``min(255, gain |image - first|)``, and the mean absolute difference in 8-bit steps."""
    gap = np.abs(np.asarray(image.convert("RGB"), np.float32) - np.asarray(first.convert("RGB"), np.float32))
    return PIL.fromarray(np.minimum(gap * gain, 255).round().astype(np.uint8)), float(gap.mean())


def board(request: Request, columns: Sequence[Column], gain: float | None = None, working: int | None = None) -> str:
    """All columns.

    Args:
        columns: those that are finished, the one at work with its previews, those to come without images.
        gain: None shows the images; a number their absolute difference from the first column, times it.
        working: the index of the column at work.
    """
    parts = [_column(request, c, columns, gain, c == working) for c in range(len(columns))]
    return f'<div class="gk-board" role="group" aria-label="Images by guidance">{"".join(parts)}</div>'


def _column(request: Request, c: int, columns: Sequence[Column], gain: float | None, working: bool) -> str:
    column, first = columns[c], columns[0]
    differs = gain is not None and c > 0 and len(first.images) == len(column.images) > 0
    figures, gaps = [], []
    for k in range(len(request.seeds)):
        seed, alt = request.seeds[k], f"{request.name(k)}, seed {request.seeds[k]}, {column.guidance}"
        if k >= len(column.images):
            shown = '<div class="gk-blank"></div>'
        elif differs and gain is not None:
            image, gap = difference(column.images[k], first.images[k], gain)
            gaps.append(gap)
            shown = picture(image, f"difference from column 1: {alt}")
        else:
            shown = picture(column.images[k], f"preview of {alt}" if working else alt)
        cost = _cost(column, k)
        figures.append(
            f"<figure>{shown}<figcaption><b>{html.escape(request.name(k))}</b> "
            f"<span>seed {seed}</span>{cost}</figcaption></figure>"
        )
    note = _note(column, working, gain, c, gaps)
    return (
        f'<section class="gk-col{" gk-working" if working else ""}" aria-label="Column {c + 1}: {html.escape(column.guidance)}">'
        f'<header><span class="gk-number">{c + 1}</span><code>{html.escape(column.guidance)}</code></header>'
        f'<p class="gk-sum">{note}</p><div class="gk-images" style="--n:{_side(len(figures))}">{"".join(figures)}</div></section>'
    )


def _side(count: int) -> int:
    """Images in a row: as square as can be, at most 4."""
    return min(math.ceil(math.sqrt(count)), 4)


def _cost(column: Column, k: int) -> str:
    if not column.nfe:
        return ""
    return f'<span class="gk-cost"><i>{column.nfe[k]} NFE</i> <i>{column.seconds / len(column.nfe):.2f} s</i></span>'


def _note(column: Column, working: bool, gain: float | None, c: int, gaps: Sequence[float]) -> str:
    if column.error:
        return html.escape(column.error)
    if working:
        return "working …"
    if not column.images:
        return "waiting"
    if gaps:
        return f"|column {c + 1} − column 1| × {gain:g} · mean {sum(gaps) / len(gaps):.1f} of 255"
    mean = sum(column.nfe) / max(len(column.nfe), 1)
    first = " · the images themselves" if gain is not None else ""
    return f"{mean:.4g} NFE an image · {column.seconds:.2f} s in all{first}" if column.nfe else "cancelled"


__all__ = ["board", "difference", "picture"]
