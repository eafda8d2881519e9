"""Kernel distance: squared maximum mean discrepancy under the cubic kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.pairwise import tiles
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x . y / D + 1)^3`` for rows (N, D) and (M, D); float64 (Binkowski et al. 2018, section 4)."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def within_mean(sample: Sample) -> float:
    """Mean kernel over all ordered pairs of different images."""
    x, n = sample.features, len(sample)
    total = sum(float(cubic_kernel(x[rows], x).sum()) for rows in tiles(n, n))
    own = float((x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum())
    return (total - own) / (n * (n - 1))


def across_mean(pair: Pair) -> Tensor:
    """Mean kernel (N,) of each generated image with all reference images."""
    real, fake = pair.real.features, pair.fake.features
    return torch.cat([cubic_kernel(fake[rows], real).mean(dim=1) for rows in tiles(len(pair.fake), len(pair.real))])


def _real_mean(pair: Pair) -> float:
    return pair.real.once("kid_within", lambda: within_mean(pair.real))


def _across(pair: Pair) -> Tensor:
    return pair.once("kid_across", lambda: across_mean(pair))


def _value(pair: Pair) -> float:
    """``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` over pairs of different images.

    The unbiased estimate of Gretton et al. 2012, eq. 3, exact over all pairs: no subsets, hence no seed.
    """
    return _real_mean(pair) + within_mean(pair.fake) - 2 * float(_across(pair).mean())


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    """Resampled generated images; pairs of an image with its own copy are left out, as in the estimate itself."""
    x, weight = pair.fake.features, counts.fake
    total = torch.zeros(weight.shape[0], dtype=torch.float64)
    for rows in tiles(len(pair.fake), len(pair.fake)):
        kernel = cubic_kernel(x[rows], x)
        here = torch.arange(rows.start, rows.stop)
        kernel[here - rows.start, here] = 0
        total += ((weight[:, rows] @ kernel) * weight).sum(dim=1)
    n = len(pair.fake)
    pairs = n**2 - weight.square().sum(dim=1)
    return _real_mean(pair) + total / pairs - 2 * (weight @ _across(pair)) / n


register(
    Spec(
        name="kid",
        title="KID-{extractor}",
        variant="kid/cubic/full-unbiased",
        better="lower",
        source="features",
        value=_value,
        replicates=_replicates,
        interval_of="generated images; reference fixed",
    )
)
