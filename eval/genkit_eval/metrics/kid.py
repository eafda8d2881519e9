"""Kernel distance: squared maximum mean discrepancy under the cubic kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts, normal
from genkit_eval.metrics.kernels import ones, row_means, weighted_sum
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

# torch-fidelity's defaults.
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x . y / D + 1)^3`` for rows (N, D) and (M, D); float64 (Binkowski et al. 2018, section 4)."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def _within(sample: Sample) -> float:
    """Mean kernel over all ordered pairs of different images."""
    x, n = sample.features, len(sample)
    return sample.once("kid_within", lambda: float(weighted_sum(cubic_kernel, x, ones(x), diagonal=False)) / (n * (n - 1)))


def _across(pair: Pair) -> Tensor:
    """Mean kernel (N,) of each generated image with all reference images."""
    return pair.once("kid_across", lambda: row_means(cubic_kernel, pair.fake.features, pair.real.features))


def _value(pair: Pair) -> float:
    """``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` over pairs of different images.

    The unbiased estimate of Gretton et al. 2012, eq. 3, exact over all pairs: no subsets, hence no seed.
    """
    return _within(pair.real) + _within(pair.fake) - 2 * float(_across(pair).mean())


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    """Resampled generated images; pairs of an image with its own copy are left out, as in the estimate itself."""
    n, weight = len(pair.fake), counts.fake
    total = weighted_sum(cubic_kernel, pair.fake.features, weight, diagonal=False)
    pairs = n**2 - weight.square().sum(dim=1)
    return _within(pair.real) + total / pairs - 2 * (weight @ _across(pair)) / n


@dataclass(frozen=True)
class Subsets:
    """Mean and (population) standard deviation over subsets."""

    mean: float
    std: float
    count: int


def kid_subsets(real: Tensor, fake: Tensor, subsets: int, size: int, seed: int = SEED) -> Subsets:
    """The estimate over ``subsets`` pairs of random subsets of ``size`` images, drawn as torch-fidelity 0.4 draws them.

    Each from one RandomState(seed) without replacement, generated before real. ValueError for fewer images than ``size``.
    """
    fewest = min(len(real), len(fake))
    if not 2 <= size <= fewest:
        raise ValueError(f"size: got {size} for {len(real)} real and {len(fake)} generated images; 2 to {fewest} works")
    drawn, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (part[torch.from_numpy(drawn.choice(len(part), size, replace=False))].double() for part in (fake, real))
        inner = sum(k.sum() - k.diagonal().sum() for k in (cubic_kernel(x, x), cubic_kernel(y, y)))
        found.append(inner / (size * (size - 1)) - 2 * cubic_kernel(x, y).mean())
    values = torch.stack(found)
    return Subsets(float(values.mean()), float(values.std(correction=0)), subsets)


def _subsets(pair: Pair) -> Subsets:
    return pair.once("kid_subsets", lambda: kid_subsets(pair.real.features, pair.fake.features, SUBSETS, SUBSET_SIZE))


def _subset_replicates(pair: Pair, counts: Counts) -> Tensor:
    """Deviations of the estimate over all pairs, and the spread of the mean over the subsets drawn."""
    found, spread = _subsets(pair), _replicates(pair, counts) - _value(pair)
    return found.mean + spread + normal(counts, found.std / found.count**0.5)


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
register(
    Spec(
        name="kid_subsets",
        title="KID-{extractor} (subsets)",
        variant=f"kid/tf-subsets/{SUBSETS}x{SUBSET_SIZE}",
        better="lower",
        source="features",
        value=lambda pair: _subsets(pair).mean,
        replicates=_subset_replicates,
        interval_of="generated images, and the subsets drawn; reference fixed",
        least=SUBSET_SIZE,
        standard=False,
    )
)
