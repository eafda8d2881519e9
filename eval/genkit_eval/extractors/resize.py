"""The resize rules of the published evaluators, each a function of (pixels, size) under the name that is recorded.

Pixels are (B, 3, H, W), uint8 or float in levels of 0..255; the result is float32 (B, 3, size, size) in levels. The aspect is
ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def tf1(pixels: Tensor, size: int) -> Tensor:
    """Bilinear of TensorFlow 1: corner (0, 0) kept, no half pixel, no antialias. ADM's graph and torch-fidelity (same bits)."""
    # Columns first, as there; each axis as rows, which are copied whole.
    x = _lerp_rows(pixels.transpose(2, 3).contiguous().float(), size)
    return _lerp_rows(x.transpose(2, 3).contiguous(), size)


def _lerp_rows(x: Tensor, size: int) -> Tensor:
    """``lo + (hi - lo) * d`` in three rounded steps: a fused multiply-add would give other last bits."""
    n = x.shape[2]
    at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size, dtype=torch.float32)
    row = at.long()
    low = x.index_select(2, row)
    return x.index_select(2, (row + 1).clamp_max(n - 1)).sub_(low).mul_((at - row)[:, None]).add_(low)


def torch_bicubic_antialias(pixels: Tensor, size: int) -> Tensor:
    """Bicubic with antialias, values outside 0..255 kept. EDM2's DINOv2."""
    return F.interpolate(pixels.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)


def clean(pixels: Tensor, size: int) -> Tensor:
    """PIL's bicubic on float channels, clamped, never rounded. clean-fid, dgm-eval's ``--clean_resize``."""
    rows, columns = (_bicubic_weights(n, size).to(pixels.device) for n in pixels.shape[2:])
    return (rows.T @ (pixels.float() @ columns)).clamp_(0, 255)


@lru_cache(maxsize=16)
def _bicubic_weights(n: int, size: int) -> Tensor:
    """(n, size) weights of the antialiased bicubic, computed in float64: float32 ones move pixels by up to 0.007 level."""
    eye = torch.eye(n, dtype=torch.float64)[None, None]
    return F.interpolate(eye, (n, size), mode="bicubic", align_corners=False, antialias=True)[0, 0].float()


def torch_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Bilinear with half pixels, no antialias. pytorch-fid, clean-fid's ``legacy_pytorch``."""
    return F.interpolate(pixels.float(), (size, size), mode="bilinear", align_corners=False)


def torchmetrics(pixels: Tensor, size: int) -> Tensor:
    """Bilinear with antialias. torchmetrics from 1.8 on."""
    return F.interpolate(pixels.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)


def pil_bicubic(pixels: Tensor, size: int) -> Tensor:
    """PIL's bicubic on 8-bit images, so rounded to levels. dgm-eval's default, EDM2's "pil", clean-fid's quantised rule.

    Raises ValueError for pixels that are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: got {pixels.dtype}; the rule pil-bicubic takes uint8")
    images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    resized = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(pixels.device).float()


def crop_pil_bicubic(pixels: Tensor, size: int) -> Tensor:
    """The largest square in the middle, then :func:`pil_bicubic`. cmmd-pytorch, text2image-benchmark."""
    height, width = pixels.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pil_bicubic(pixels[:, :, top : top + side, left : left + side], size)


def none(pixels: Tensor, size: int) -> Tensor:
    """As generated. ValueError for images of another size than the network's."""
    if tuple(pixels.shape[2:]) != (size, size):
        shown = "x".join(map(str, pixels.shape[2:]))
        raise ValueError(f"resize='none': got images of {shown}; the network takes {size}x{size}, or give a resize rule")
    return pixels.float()


#: Resize rules by recorded name.
RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf1": tf1,
    "clean": clean,
    "torch-bilinear": torch_bilinear,
    "torchmetrics": torchmetrics,
    "torch-bicubic-antialias": torch_bicubic_antialias,
    "pil-bicubic": pil_bicubic,
    "crop-pil-bicubic": crop_pil_bicubic,
    "none": none,
}


@dataclass(frozen=True)
class Preprocess:
    """From uint8 images to what a network takes: resized to ``size`` by ``rule``, then (x - mean) / std in levels, per channel.

    ``size`` None leaves images as they are.
    """

    rule: str
    size: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 (B, 3, size, size)."""
        x = pixels.float() if self.size is None else RULES[self.rule](pixels, self.size)
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std
