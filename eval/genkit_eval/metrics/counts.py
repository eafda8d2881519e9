"""Bootstrap resamples as counts, and the interval made from the values on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """How often each image enters each resample: ``fake`` (B, N) and ``real`` (B, M), float64; every row sums to N (or M).

    ``noise`` (B, GROUPS) holds standard normal numbers that stand for the generated sample where it cannot be resampled (a copy
    of an image would be its own neighbour, and lowers the rank of a small sample); None leaves that part out.
    """

    fake: Tensor
    real: Tensor
    noise: Tensor | None = None


#: Most groups that generated images are left out in, one at a time.
GROUPS = 20


def group_of(n: int, groups: int) -> Tensor:
    """Group (n,) of each image, by a shuffle that depends on n alone: of files sorted by class, each group gets all classes."""
    order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(n))
    group = torch.empty(n, dtype=torch.int64)
    group[order] = torch.arange(n) * groups // n
    return group


def jackknife(n: int, without: Callable[[Tensor], Tensor], counts: Counts, groups: int = GROUPS) -> Tensor | float:
    """``sum_g xi_bg (v_g - mean v) ((G - 1) / G)^(1/2)`` (B,), with v_g the metric without group g and xi standard normal.

    ``without`` gets the group (n,) of each image and returns v (G,). The variance is that of the grouped jackknife (Efron 1982,
    The Jackknife, the Bootstrap and Other Resampling Plans). 0 without ``counts.noise``, and for fewer than two images a group.
    """
    if counts.noise is None or n < 2 * groups:
        return 0.0
    left = without(group_of(n, groups)).double()
    noise: Tensor = counts.noise[:, :groups] @ (left - left.mean()) * ((groups - 1) / groups) ** 0.5
    return noise


def normal(counts: Counts, deviation: float) -> Tensor | float:
    """A spread with standard deviation ``deviation`` (B,) that does not come from the images (subsets or directions drawn)."""
    if counts.noise is None:
        return 0.0
    spread: Tensor = counts.noise.sum(dim=1) * (deviation / counts.noise.shape[1] ** 0.5)
    return spread


def _resample(n: int, replicates: int, generator: torch.Generator) -> Tensor:
    if n == 0:
        return torch.zeros(replicates, 0, dtype=torch.float64)
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
