"""Frechet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit_eval.metrics.counts import GROUPS, Counts, jackknife
from genkit_eval.metrics.moments import Moments, moments_of
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

# Multiply-adds up to which every resample gets its own distance: seconds; 200 of 50,000 x 2048 would be hours.
BUDGET = 2e11
OVER = (
    f"generated images (beyond {BUDGET:.0e} operations, or with images no more than twice the dimensions, {GROUPS} groups left "
    "out in turn); reference moments fixed; expectation at this sample count"
)


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,), total variance, and ``factor`` F (D, R) with F F^T = covariance; ``full``: R = D and no pivot is zero."""

    mean: Tensor
    trace: Tensor
    factor: Tensor
    full: bool


def gaussian(moments: Moments, features: Tensor | None = None) -> Gaussian:
    """The Gaussian with these moments. Pass ``features`` only if they are all that the moments were taken from.

    Fewer images than columns: the centred features themselves are the factor, exact where one of the singular covariance is not.
    """
    cov = moments.cov
    if features is not None and features.shape[0] <= features.shape[1]:
        factor = (features.double() - moments.mean).T / (moments.n - 1) ** 0.5
        return Gaussian(moments.mean, cov.trace(), factor, False)
    factor, failed = torch.linalg.cholesky_ex(cov)
    if not bool(failed):
        return Gaussian(moments.mean, cov.trace(), factor, True)
    values, vectors = torch.linalg.eigh(cov)
    return Gaussian(moments.mean, cov.trace(), vectors * values.clamp(min=0).sqrt(), False)


def between(first: Gaussian, second: Gaussian) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` without a matrix square root.

    With S1 = F1 F1^T and S2 = F2 F2^T, tr (S1 S2)^(1/2) is the nuclear norm of A = F1^T F2; for full-rank factors it is the sum
    of the root eigenvalues of A A^T, which is faster. Raises ValueError when rounding makes the result clearly negative.
    Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
    """
    product = first.factor.T @ second.factor
    if first.full and second.full:
        root = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(product).sum()
    trace = first.trace + second.trace
    value = float((first.mean - second.mean).square().sum() + trace - 2 * root)
    if not value >= -1e-6 * float(trace):
        raise ValueError(
            f"Frechet distance came out as {value:g} for a total variance of {float(trace):g}: the covariances are not valid"
        )
    return max(value, 0.0)


def frechet_distance(
    first: Moments, second: Moments, first_features: Tensor | None = None, second_features: Tensor | None = None
) -> float:
    """Distance from two sets of moments; see ``between`` and, for the features, ``gaussian``."""
    return between(gaussian(first, first_features), gaussian(second, second_features))


def gaussian_of(sample: Sample) -> Gaussian:
    """The Gaussian of a sample, found once."""
    return sample.once("gaussian", lambda: gaussian(sample.moments, sample.features if sample.owns_moments else None))


def frechet(pair: Pair) -> float:
    """The distance of a pair, found once."""
    return pair.once("frechet", lambda: between(gaussian_of(pair.real), gaussian_of(pair.fake)))


def frechet_replicates(pair: Pair, counts: Counts) -> Tensor:
    """Resamples where that is cheap and valid, else a jackknife: copies take away rank, of which few images have too little."""
    n, d = pair.fake.features.shape
    if n <= 2 * d or len(counts.fake) * float(n + d) * d**2 > BUDGET:
        value = torch.full((len(counts.fake),), frechet(pair), dtype=torch.float64)
        return value + jackknife(n, lambda group: _without(pair, group), counts)
    return _resampled(pair, counts)


def _without(pair: Pair, group: Tensor) -> Tensor:
    found = []
    for g in range(GROUPS):
        x = pair.fake.features
        moments = pair.fake.moments.without(moments_of(x[group == g]))
        found.append(between(gaussian_of(pair.real), gaussian(moments, x[group != g] if moments.n <= x.shape[1] else None)))
    return torch.tensor(found, dtype=torch.float64)


def _resampled(pair: Pair, counts: Counts) -> Tensor:
    """Each resample's moments need one weighted product of the features turned by the reference's factor."""
    real = gaussian_of(pair.real)
    x = pair.fake.features - pair.fake.moments.mean
    shift = real.mean - pair.fake.moments.mean
    turned, norms, n = x @ real.factor, x.square().sum(dim=1), len(pair.fake)
    values = []
    for count in counts.fake:
        mean, turned_mean = count @ x / n, count @ turned / n
        inner = (turned.T * count) @ turned - n * torch.outer(turned_mean, turned_mean)
        trace = (count @ norms - n * mean.square().sum()) / (n - 1)
        root = torch.linalg.eigvalsh(inner / (n - 1)).clamp(min=0).sqrt().sum()
        values.append((mean - shift).square().sum() + real.trace + trace - 2 * root)
    return torch.stack(values).clamp(min=0)


def _register(name: str, title: str, variant: str, layer: str) -> None:
    register(
        Spec(
            name=name,
            title=title,
            variant=variant,
            better="lower",
            source="features",
            value=lambda pair: frechet(pair.of(layer)),
            replicates=lambda pair, counts: frechet_replicates(pair.of(layer), counts),
            interval_of=OVER,
            ideal=0.0,
            bounds=(0.0, torch.inf),
            layer=layer,
            reference="moments",
            standard=layer == "features",
        )
    )


_register("frechet", "{fd}", "{fd}", "features")
# ADM's spatial features: where things are in the image, not only what they are (Nash et al. 2021).
_register("sfid", "s{fd}", "s{fd}", "spatial")
