"""Frechet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.moments import Moments
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample


def cov_factor(moments: Moments, features: Tensor | None = None) -> tuple[Tensor, bool]:
    """``F`` with ``F F^T`` = covariance, and whether it is a Cholesky factor (full rank).

    Fewer images than columns: the centred features themselves, exact where a factor of the singular covariance is not.
    """
    if features is not None and features.shape[0] <= features.shape[1]:
        return (features.double() - moments.mean).T / (moments.n - 1) ** 0.5, False
    factor, failed = torch.linalg.cholesky_ex(moments.cov)
    if not bool(failed):
        return factor, True
    values, vectors = torch.linalg.eigh(moments.cov)
    return vectors * values.clamp(min=0).sqrt(), False


def frechet_distance(
    first: Moments, second: Moments, first_features: Tensor | None = None, second_features: Tensor | None = None
) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` without a matrix square root.

    With S1 = F1 F1^T and S2 = F2 F2^T, tr (S1 S2)^(1/2) is the nuclear norm of F1^T F2; for full-rank factors it is the sum of
    the root eigenvalues of F1^T S2 F1, which is faster. Pass features only if they are all that the moments were taken from.
    Raises ValueError when rounding makes the result clearly negative. Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
    """
    f1, full1 = cov_factor(first, first_features)
    f2, full2 = cov_factor(second, second_features)
    if full1 and full2:
        root = torch.linalg.eigvalsh(f1.T @ second.cov @ f1).clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(f1.T @ f2).sum()
    trace = first.cov.trace() + second.cov.trace()
    value = float((first.mean - second.mean).square().sum() + trace - 2 * root)
    if value < -1e-6 * float(trace):
        raise ValueError(
            f"Frechet distance came out as {value:g} for a total variance of {float(trace):g}: the covariances are not valid"
        )
    return max(value, 0.0)


def _features(sample: Sample) -> Tensor | None:
    return sample.features if sample.owns_moments else None


def _value(pair: Pair) -> float:
    return frechet_distance(pair.real.moments, pair.fake.moments, _features(pair.real), _features(pair.fake))


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    """Each resample's moments need one weighted product of the features turned by the reference's factor."""
    real = pair.real.moments
    factor, _ = pair.real.once("cov_factor", lambda: cov_factor(real, _features(pair.real)))
    x = pair.fake.features - pair.fake.moments.mean
    shift = real.mean - pair.fake.moments.mean
    turned, norms, n = x @ factor, x.square().sum(dim=1), len(pair.fake)
    values = []
    for count in counts.fake:
        mean, turned_mean = count @ x / n, count @ turned / n
        inner = (turned.T * count) @ turned - n * torch.outer(turned_mean, turned_mean)
        trace = (count @ norms - n * mean.square().sum()) / (n - 1)
        root = torch.linalg.eigvalsh(inner / (n - 1)).clamp(min=0).sqrt().sum()
        values.append((mean - shift).square().sum() + real.cov.trace() + trace - 2 * root)
    return torch.stack(values).clamp(min=0)


register(
    Spec(
        name="frechet",
        title="FD-{extractor}",
        variant="fd/float64",
        better="lower",
        source="features",
        value=_value,
        replicates=_replicates,
        interval_of="generated images; reference moments fixed; expectation at this sample count",
        ideal=0.0,
        bounds=(0.0, torch.inf),
        over_moments=True,
    )
)
