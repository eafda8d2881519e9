"""Mean and covariance in float64, streamed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter ``sum (x - mean)(x - mean)^T`` (D, D), float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @property
    def cov(self) -> Tensor:
        """Covariance with divisor n - 1; ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"covariance of {self.n} image(s); at least 2 are needed")
        return self.scatter / (self.n - 1)

    @classmethod
    def from_cov(cls, n: int, mean: Tensor, cov: Tensor) -> Moments:
        """Moments from a stored mean and covariance (divisor n - 1)."""
        return cls(n, mean.double(), cov.double() * (n - 1))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        return Moments(n, mean, self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * other.n / n))

    def without(self, part: Moments) -> Moments:
        """Moments of what is left when ``part`` of the images is taken out: ``merge`` backwards."""
        n = self.n - part.n
        mean = (self.mean * self.n - part.mean * part.n) / n
        delta = part.mean - mean
        return Moments(n, mean, self.scatter - part.scatter - torch.outer(delta, delta) * (n * part.n / self.n))


def chunk_moments(x: Tensor) -> Moments:
    """Moments of one chunk (n, D), shifted by its own mean before squaring."""
    x = x.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return Moments(x.shape[0], mean, centred.T @ centred)


def moments_of(x: Tensor, chunk: int = 2048) -> Moments:
    """Moments of (N, D) features, merged chunk by chunk in index order: float64 copies of ``chunk`` rows at a time.

    All chunks are shifted by the mean of the first, so that means far from zero cost the covariance no digits.
    """
    first, *rest = x.split(chunk)
    shift = first.double().mean(dim=0)
    total = chunk_moments(first.double() - shift)
    for part in rest:
        total = total.merge(chunk_moments(part.double() - shift))
    return Moments(total.n, total.mean + shift, total.scatter)
