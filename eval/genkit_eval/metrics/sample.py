"""A set of images as the metrics see it, and the pair (reference, generated) that a metric compares."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from genkit_eval.metrics.moments import Moments, moments_of

T = TypeVar("T")


class _Cached:
    """Values that several metrics need and that are computed once."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value stored under ``key``, computing it on the first call."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value


class Sample(_Cached):
    """Features (N, D) of N images and, where known, their uint8 pixels (N, 3, H, W).

    ``moments`` replaces the mean and covariance of ``features`` when they were taken over more images than are held here
    (a reference keeps statistics of a whole training set beside the features of a part of it).
    Raises ValueError for features that are not a finite matrix and for pixels that are not uint8 (N, 3, H, W).
    """

    def __init__(self, features: Tensor, pixels: Tensor | None = None, moments: Moments | None = None) -> None:
        super().__init__()
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features: got shape {tuple(features.shape)}; a matrix (N, D) with N >= 2 works")
        if not bool(torch.isfinite(features).all()):
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            raise ValueError(f"features: {bad} of {features.shape[0]} rows hold NaN or infinite values")
        if pixels is not None and (pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3):
            raise ValueError(f"pixels: got {pixels.dtype} {tuple(pixels.shape)}; uint8 (N, 3, H, W) works")
        self.features = features.to(torch.float64)
        self.pixels = pixels
        self._moments = moments

    def __len__(self) -> int:
        return int(self.features.shape[0])

    @property
    def moments(self) -> Moments:
        """Mean and covariance: those given, else those of ``features``."""
        if self._moments is not None:
            return self._moments
        return self.once("moments", lambda: moments_of(self.features))

    @property
    def owns_moments(self) -> bool:
        """Whether the moments are those of the features held here."""
        return self._moments is None


class Pair(_Cached):
    """A reference (``real``) and a generated set (``fake``) with features of one width."""

    def __init__(self, real: Sample, fake: Sample) -> None:
        super().__init__()
        if real.features.shape[1] != fake.features.shape[1]:
            raise ValueError(
                f"features: the reference has {real.features.shape[1]} columns and the generated set {fake.features.shape[1]}; "
                "both must come from one extractor"
            )
        self.real = real
        self.fake = fake
