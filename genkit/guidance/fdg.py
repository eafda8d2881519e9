"""Frequency-decoupled guidance: a scale for every band of an image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.apg import project
from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Predictions, Result, StepInfo, is_number
from genkit.guidance.several import farthest

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@lru_cache(maxsize=64)
def blur(n: int) -> Tensor:
    """The binomial kernel as an (n, n) matrix, float64; borders are mirrored, repeatedly if n is small."""
    index = torch.arange(-2, n + 2).remainder(period := max(2 * n - 2, 1))
    taps = torch.eye(n, dtype=torch.float64)[torch.minimum(index, period - index)]
    return sum((w * taps[k : k + n] for k, w in enumerate(KERNEL)), torch.zeros(()))


@lru_cache(maxsize=64)
def resize(n: int, m: int) -> Tensor:
    """Bilinear interpolation from n to m samples as an (m, n) matrix, float64, pixel centres at halves."""
    eye = torch.eye(n, dtype=torch.float64)[None]
    return torch.nn.functional.interpolate(eye, size=m, mode="linear", align_corners=False)[0].mT


def apply(matrices: Sequence[Tensor], image: Tensor) -> Tensor:
    """Multiply the last two axes of an image (..., H, W) by a matrix each."""
    rows, columns = matrices
    return rows.to(image) @ image @ columns.to(image).mT


def down(image: Tensor) -> Tensor:
    """Blurred, then at half the size, rounded down."""
    return apply([resize(n, max(n // 2, 1)) @ blur(n) for n in image.shape[-2:]], image)


def up(image: Tensor, like: Tensor) -> Tensor:
    """At the size of ``like``, then blurred."""
    return apply([blur(m) @ resize(n, m) for n, m in zip(image.shape[-2:], like.shape[-2:], strict=True)], image)


def pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """Laplacian pyramid of (..., H, W) of any size, finest band first: ``g_i - up(g_{i+1})``; the last is the coarsest g."""
    blurred = list(itertools.accumulate(range(levels - 1), lambda g, _: down(g), initial=image))
    return [g - up(coarse, g) for g, coarse in itertools.pairwise(blurred)] + blurred[-1:]


def collapse(bands: Sequence[Tensor]) -> Tensor:
    """The image of a pyramid."""
    image = bands[-1]
    for band in reversed(bands[:-1]):
        image = up(image, band) + band
    return image


@dataclass(frozen=True)
class FDG(Guidance):
    """CFG with a scale for every band of a Laplacian pyramid, ``L_i + (w_i - 1)(L_i - U_i)`` (FDG, arXiv 2506.19713).

    L and U are the bands of D_c and D_u; for images (B, C, H, W) and videos (B, C, T, H, W) of any size. An override w of the
    weight multiplies every ``w_i - 1`` by the one factor that makes the scale farthest from 1, :attr:`scale`, become w; where all
    are 1, each becomes w.

    Args:
        scales: w_i from the highest band to the lowest; 1 means no guidance of that band. The paper's for SDXL is (10, 5).
        parallel: share of the part of ``L_i - U_i`` along L_i that is kept (the split is APG's, in x0 space): one number, or one
            per band. 1 keeps all, and only then is the result the same in every space.
        start, stop: bands are guided in steps ``int(start N) <= i < int(stop N)``: one number from 0 to 1, or one per band.

    Raises:
        ValueError: an argument outside its range, or not one value per band; at the first step if a sample is no image.
    """

    scales: tuple[float, ...] = (10.0, 5.0)
    parallel: float | tuple[float, ...] = 1.0
    start: float | tuple[float, ...] = 0.0
    stop: float | tuple[float, ...] = 1.0
    logits: ClassVar[bool | None] = False  # it splits an image into frequencies
    examples: ClassVar[tuple[str, ...]] = (
        "FDG((4.0, 2.0))",
        "FDG((3.0, 5.0), parallel=(0.2, 0.6))",
        "FDG((6.0, 3.0, 2.0), start=(0.5, 0, 0), stop=(1, 0.8, 0.5))",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.scales, Sequence) or isinstance(self.scales, str) or not self.scales:
            raise ValueError(f"FDG: scales={self.scales!r} must be a list of numbers, one for each band, such as (10.0, 5.0)")
        for name, low, high in (
            ("scales", -math.inf, math.inf),
            ("parallel", -math.inf, math.inf),
            ("start", 0, 1),
            ("stop", 0, 1),
        ):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) else (value,)
            if isinstance(value, Sequence) and len(values) != len(self.scales):
                raise ValueError(f"FDG: {name}={value!r} must be one number, or {len(self.scales)}, one for each of scales")
            if not all(is_number(v) and math.isfinite(v) and low <= v <= high for v in values):
                raise ValueError(f"FDG: {name}={value!r} must hold {'finite numbers' if high > 1 else 'numbers from 0 to 1'}")
            numbers = tuple(float(v) for v in values)
            object.__setattr__(self, name, numbers if isinstance(value, Sequence) else numbers[0])

    @property
    def affine(self) -> bool:  # type: ignore[override]  # here it depends on an argument
        return all(p == 1 for p in self.per_band("parallel"))

    @property
    def scale(self) -> float:
        """The scale farthest from 1, before any override."""
        return farthest(list(self.scales))

    def per_band(self, name: str) -> tuple[float, ...]:
        """The value of an argument in every band."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.scales)

    def gains(self, info: StepInfo) -> list[float]:
        """``w_i - 1`` of every band in this evaluation; 0 where it is not guided."""
        pushes = [w - 1 for w in self.scales]
        if info.weight is not None:
            gain = info.weight - 1
            pushes = [gain if self.scale == 1 else push * gain / (self.scale - 1) for push in pushes]
        times = zip(pushes, self.per_band("start"), self.per_band("stop"), strict=True)
        return [push * (int(a * info.total) <= info.index < int(b * info.total)) for push, a, b in times]

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND, UNCOND) if any(self.gains(info)) else (COND,)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        gains, cond = self.gains(info), predictions["cond"]
        if not any(gains):
            return Result(cond), state
        if cond.ndim < 4:
            raise ValueError(f"FDG: x of shape {tuple(cond.shape)} has no height and width; it must be (B, C, H, W) or more")
        shifts = pyramid(cond - predictions["uncond"], len(gains))
        if not self.affine:
            parts = [project(d, along) for d, along in zip(shifts, pyramid(cond, len(gains)), strict=True)]
            shifts = [p * along + across for p, (along, across) in zip(self.per_band("parallel"), parts, strict=True)]
        return Result(cond + collapse([gain * d for gain, d in zip(gains, shifts, strict=True)])), state
