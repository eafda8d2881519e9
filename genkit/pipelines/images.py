"""From latents in [-1, 1] to 8-bit images."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

UINT8_RULE = "floor(127.5 x + 128) clamped to 0..255"


def to_uint8(x: Tensor) -> Tensor:
    """8-bit pixels of images in [-1, 1]: ``floor(127.5 x + 128)``, clamped (the rule of the EDM code base). Any shape.

    Raises:
        ValueError: a value is NaN or infinite: the model or the guidance diverged, and 8 bits would hide it as black.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the images hold NaN or infinity: the model or the guidance diverged; try a smaller guidance scale")
    return (x.detach().float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """PIL images of uint8 pixels (B, 3, H, W)."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in pixels]
