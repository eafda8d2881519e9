"""Image grids."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLUMNS, SCALE, GAP = 10, 2, 2
PAPER, INK = (255, 255, 255), (60, 60, 60)


def _tile(pixels: Tensor, scale: int) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def labelled_rows(rows: Sequence[tuple[str, Tensor]], scale: int = SCALE) -> Image.Image:
    """Rows of images (n, 3, H, W) uint8, its name on the left of each; enlarged ``scale`` times without smoothing."""
    first = rows[0][1]
    height, width = (int(size) * scale + GAP for size in first.shape[-2:])
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(int(probe.textlength(name)) for name, _ in rows) + 8
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (margin + columns * width, len(rows) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(rows):
        draw.text((margin - 6, r * height + height // 2), name, fill=INK, anchor="rm")
        for c, pixels in enumerate(images):
            sheet.paste(_tile(pixels, scale), (margin + c * width, r * height))
    return sheet


def class_grid(pixels: Tensor, labels: Sequence[int], class_names: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """The first ``columns`` images of each class that occurs, one class to a row, in index order."""
    known = torch.tensor(list(labels))
    rows = [(name, pixels[(known == c).nonzero().flatten()[:columns]]) for c, name in enumerate(class_names)]
    return labelled_rows([(name, images) for name, images in rows if len(images)])


def same_seeds(named: Sequence[tuple[str, Tensor]], columns: int = COLUMNS) -> Image.Image:
    """One row per guidance, one column per seed: the first ``columns`` images of each."""
    return labelled_rows([(name, pixels[:columns]) for name, pixels in named])


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
