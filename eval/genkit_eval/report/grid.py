"""Image grids."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLUMNS, ROWS, GAP = 10, 10, 2
#: Sides in pixels: images are doubled up to the first, and made smaller down to the second. Letters of a name.
DOUBLED, LARGEST, LETTERS = 64, 128, 24
PAPER, INK = (255, 255, 255), (60, 60, 60)


def _size(height: int, width: int, scale: int | None) -> tuple[int, int]:
    """Height and width as shown."""
    longest = max(height, width)
    if scale is None and longest > LARGEST:
        return max(1, height * LARGEST // longest), max(1, width * LARGEST // longest)
    factor = scale or (2 if longest <= DOUBLED else 1)
    return height * factor, width * factor


def _tile(pixels: Tensor, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    smaller = size[0] < image.height
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)


def labelled_rows(rows: Sequence[tuple[str, Tensor]], scale: int | None = None) -> Image.Image:
    """Rows of images (n, 3, H, W) uint8, its name on the left of each.

    Enlarged ``scale`` times without smoothing; by default small ones are doubled and large ones made smaller.
    """
    rows = [(name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…", images) for name, images in rows]
    shown = _size(int(rows[0][1].shape[-2]), int(rows[0][1].shape[-1]), scale)
    height, width = (size + GAP for size in shown)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(int(probe.textlength(name)) for name, _ in rows) + 8
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (margin + columns * width, len(rows) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(rows):
        draw.text((margin - 6, r * height + height // 2), name, fill=INK, anchor="rm")
        for c, pixels in enumerate(images):
            sheet.paste(_tile(pixels, shown), (margin + c * width, r * height))
    return sheet


def class_grid(pixels: Tensor, labels: Sequence[int], class_names: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """The first ``columns`` images of each class that occurs, one class to a row, in index order.

    ``labels`` may go on beyond the images. Of more than ``ROWS`` classes those with most images are shown; where none has
    several, images as they come.
    """
    known = torch.tensor(list(labels)[: len(pixels)])
    counts = torch.bincount(known, minlength=len(class_names))
    found = counts.argsort(descending=True, stable=True)[:ROWS].sort().values.tolist()
    if len(class_names) > ROWS and int(counts.max()) < 2:
        parts = pixels[: ROWS * columns].split(columns)
        return labelled_rows([(f"{k * columns}", images) for k, images in enumerate(parts)])
    rows = [(class_names[c], pixels[(known == c).nonzero().flatten()[:columns]]) for c in found if counts[c]]
    return labelled_rows(rows)


def same_seeds(named: Sequence[tuple[str, Tensor]], columns: int = COLUMNS) -> Image.Image:
    """One row per guidance, one column per seed: the first ``columns`` images of each."""
    return labelled_rows([(name, pixels[:columns]) for name, pixels in named])


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
