"""Bootstrap resamples as counts, and the interval made from the values on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """How often each image enters each resample: ``fake`` (B, N) and ``real`` (B, M), float64; every row sums to N (or M).

    ``noise`` (B, GROUPS) holds standard normal numbers that stand for the generated sample where it cannot be resampled (a copy
    of an image would be its own neighbour); None leaves that part out.
    """

    fake: Tensor
    real: Tensor
    noise: Tensor | None = None


#: Groups of consecutive generated images, left out one at a time.
GROUPS = 5


def _resample(n: int, replicates: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(n, (replicates, n), generator=generator)
    return torch.zeros(replicates, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(replicates, n, dtype=torch.float64))


def draw_counts(n_fake: int, n_real: int, replicates: int, seed: int = 0) -> Counts:
    """Draw B resamples with replacement (Efron 1979), a function of the sizes and ``seed`` alone.

    Guidances of one run have the same N, so they get the same resamples: differences between them are paired by seed and class.
    """
    first, second = (torch.Generator("cpu").manual_seed(2 * seed + i) for i in range(2))
    fake, real = _resample(n_fake, replicates, first), _resample(n_real, replicates, second)
    return Counts(fake, real, torch.randn(replicates, GROUPS, generator=first, dtype=torch.float64))


def interval(
    value: float, replicates: Tensor, level: float = 0.95, bounds: tuple[float, float] = (-torch.inf, torch.inf)
) -> tuple[float, float]:
    """Centred percentile interval ``value + (quantiles of replicates - mean of replicates)``, cut to ``bounds``.

    A distance between estimated moments is biased upwards, and a resample repeats that bias; deviations from the mean of the
    replicates keep it out. The interval is thus for the metric's expectation at this sample count, not at an infinite one.
    """
    tail = (1.0 - level) / 2.0
    deviations = replicates.double() - replicates.double().mean()
    low, high = torch.quantile(deviations, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return max(value + low, min(bounds[0], value)), min(value + high, max(bounds[1], value))
