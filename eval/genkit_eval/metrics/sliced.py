"""Sliced Wasserstein distance: the mean over directions of the distance between one-dimensional projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit_eval.metrics.counts import GROUPS, Counts, jackknife, normal
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair

DIRECTIONS, SEED, AT_ONCE = 256, 0, 16


@dataclass(frozen=True)
class Sliced:
    """Squared distance ``squared`` (may be a little below 0), its standard error over directions, and the root of it."""

    squared: float
    standard_error: float

    @property
    def distance(self) -> float:
        """``max(squared, 0)^(1/2)``."""
        return float(max(self.squared, 0.0) ** 0.5)


def directions(width: int, count: int = DIRECTIONS, seed: int = SEED) -> Tensor:
    """Unit vectors (count, D) float64, uniform on the sphere."""
    drawn: Tensor = torch.randn(count, width, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def wasserstein_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance (L,) between the values of each row of x (L, N) and y (L, M), sorted ascending; any counts.

    Exact: the quantile functions are steps, multiplied out over the union of their edges i / N and j / M.
    """
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return torch.mean((x - y).square(), dim=1)
    edges = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = edges.diff(prepend=edges.new_zeros(1)).double() / (n * m)
    return torch.mv((x[:, (edges - 1) // m] - y[:, (edges - 1) // n]).square(), width)


def controlled(values: Tensor, theta: Tensor, gap: Tensor) -> Sliced:
    """``mean W - alpha mean c`` with control variate ``c = (theta . gap)^2 - |gap|^2 / D`` and alpha = Cov(W, c) / Var(c).

    c is what the difference of means, ``gap`` (D,), adds to W along theta, less its mean over the sphere: Nguyen and Ho 2024,
    "Sliced Wasserstein estimation with control variates" (the lower-bound variate). alpha comes from the same directions.
    """
    variate = (theta @ gap).square() - gap.square().sum() / len(gap)
    variance = variate.var()
    alpha = torch.cov(torch.stack([values, variate]))[0, 1] / variance if variance > 0 else variance
    rest = values - alpha * variate
    return Sliced(float(rest.mean()), float(rest.std() / len(rest) ** 0.5))


def _projected(features: Tensor, theta: Tensor) -> Tensor:
    """Projections (L, N) float64."""
    return torch.cat([(part.double() @ theta.T).T for part in features.split(4096)], dim=1)


def sliced_wasserstein(real: Tensor, fake: Tensor, group: Tensor | None = None, seed: int = SEED) -> list[Sliced]:
    """The distance, and after it, where ``group`` (N,) is given, that without each group of ``fake`` in turn."""
    theta = directions(fake.shape[1], seed=seed)
    keeps = [torch.ones(len(fake), dtype=torch.bool)]
    keeps += [] if group is None else [group != g for g in range(int(group.max()) + 1)]
    values: list[list[Tensor]] = [[] for _ in keeps]
    for part in theta.split(AT_ONCE):
        y = _projected(real, part).sort(dim=1).values
        x, order = _projected(fake, part).sort(dim=1)
        for found, keep in zip(values, keeps, strict=True):
            found.append(wasserstein_squared(x[keep[order]].reshape(len(part), -1), y))
    mean = real.mean(dim=0, dtype=torch.float64)
    gaps = [fake[keep].mean(dim=0, dtype=torch.float64) - mean for keep in keeps]
    return [controlled(torch.cat(found), theta, gap) for found, gap in zip(values, gaps, strict=True)]


def _found(pair: Pair) -> Sliced:
    return pair.once("sliced", lambda: sliced_wasserstein(pair.real.features, pair.fake.features)[0])


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    found = _found(pair)

    def without(group: Tensor) -> Tensor:
        rest = sliced_wasserstein(pair.real.features, pair.fake.features, group)[1:]
        return torch.tensor([one.distance for one in rest], dtype=torch.float64)

    value = torch.full((len(counts.fake),), found.distance, dtype=torch.float64)
    error = found.standard_error / (2 * found.distance) if found.distance else 0.0
    return value + jackknife(len(pair.fake), without, counts) + normal(counts, error)


def gaussian_approximation(pair: Pair) -> float:
    """``(|m1 - m2|^2 / D + (t1^(1/2) - t2^(1/2))^2)^(1/2)``, t = mean squared distance from the mean over D: no directions.

    What the projections' distance tends to for high D and weak dependence. Nadjahi et al. 2021.
    """
    real, fake = pair.real.moments, pair.fake.moments
    spread = [(m.scatter.trace() / m.n / len(m.mean)).sqrt() for m in (real, fake)]
    return float(((real.mean - fake.mean).square().mean() + (spread[0] - spread[1]) ** 2).sqrt())


def _approximate_replicates(pair: Pair, counts: Counts) -> Tensor:
    """Resamples of the mean and of the spread."""
    n, centre, real = len(pair.fake), pair.fake.moments.mean, pair.real.moments
    mean = torch.zeros(len(counts.fake), len(centre), dtype=torch.float64)
    second = torch.zeros(len(counts.fake), dtype=torch.float64)
    for part, weight in zip(pair.fake.features.split(4096), counts.fake.split(4096, dim=1), strict=True):
        x = part.double() - centre
        mean += weight @ x / n
        second += weight @ x.square().sum(dim=1) / n
    t1, t2 = real.scatter.trace() / real.n / len(centre), (second - mean.square().sum(dim=1)) / len(centre)
    return ((mean + centre - real.mean).square().mean(dim=1) + (t1.sqrt() - t2.clamp(min=0).sqrt()) ** 2).sqrt()


register(
    Spec(
        name="sliced_wasserstein",
        title="SW2-{extractor}",
        variant=f"sw2/control-variate/{DIRECTIONS}-directions/seed{SEED}",
        better="lower",
        source="features",
        value=lambda pair: _found(pair).distance,
        replicates=_replicates,
        interval_of=f"generated images, {GROUPS} groups left out in turn (a bootstrap of this distance is not consistent), and "
        "the directions drawn; reference fixed",
        ideal=0.0,
        bounds=(0.0, torch.inf),
        standard=False,
    )
)
register(
    Spec(
        name="sliced_wasserstein_gaussian",
        title="SW2-{extractor} (approx.)",
        variant="sw2/gaussian-approximation",
        better="lower",
        source="features",
        value=gaussian_approximation,
        replicates=_approximate_replicates,
        interval_of="generated images; reference moments fixed",
        ideal=0.0,
        bounds=(0.0, torch.inf),
        reference="moments",
        standard=False,
    )
)
