"""What a reference holds, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genkit_eval.extractors.base import MAIN as MAIN
from genkit_eval.metrics.moments import Moments, chunk_moments


@dataclass(frozen=True)
class Layer:
    """Moments over all images, and the features (M, D) of some of them; either may be missing."""

    moments: Moments | None = None
    features: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of columns."""
        if self.moments is not None:
            return int(self.moments.mean.shape[0])
        assert self.features is not None
        return int(self.features.shape[1])


@dataclass(frozen=True)
class Contents:
    """Layers by name, ``"features"`` being the main one; what is known about them; some of the images uint8 (K, H, W, 3).

    ``about`` has texts: ``num_images``, ``extractor``, ``extractor_sha256``, ``resize``, ``dataset`` and others. What a format
    does not record is absent. ``notes`` are sentences that a reader of the numbers needs.
    """

    layers: dict[str, Layer]
    about: dict[str, str]
    pixels: Tensor | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def num_images(self) -> int:
        """Images behind the moments, 0 where the file does not say."""
        text = self.about.get("num_images", "")
        return int(text) if text.isdecimal() else 0

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of numbers."""
        for layer in self.layers.values():
            if layer.moments is not None:
                yield layer.moments.mean
                yield layer.moments.scatter
            if layer.features is not None:
                yield layer.features


class StreamingMoments:
    """Mean and covariance of rows that come in parts, float64, merged in the order in which they come.

    All parts are shifted by the mean of the first, so that a mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.shift: Tensor | None = None
        self.total: Moments | None = None

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, D)."""
        if not len(rows):
            return
        if self.shift is None:
            self.shift = rows.double().mean(dim=0)
        part = chunk_moments(rows.double() - self.shift)
        self.total = part if self.total is None else self.total.merge(part)

    def moments(self) -> Moments:
        """Of everything so far; ValueError when that is nothing."""
        if self.total is None or self.shift is None:
            raise ValueError("no rows")
        return Moments(self.total.n, self.total.mean + self.shift, self.total.scatter)


def moments_from(count: int, mean: Tensor, cov: Tensor) -> Moments:
    """Moments from a stored mean and covariance; a ``count`` that is not known (0) does not enter the covariance."""
    return Moments.from_cov(max(count, 2), mean.to(torch.float64), cov.to(torch.float64))
