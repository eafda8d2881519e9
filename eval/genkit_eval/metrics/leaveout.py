"""Spread of recall and coverage over the generated sample: groups of its images left out in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import GROUPS, Counts
from genkit_eval.metrics.pairwise import Distances, nearest_squared, tiles
from genkit_eval.metrics.sample import Pair

# Neighbours among the generated images cost the square of their number: of more images, these first ones stand for all.
MOST = 3000


def group_of(n: int) -> Tensor:
    """Group (n,) of each image: runs of neighbours in index, so that each holds all classes of a balanced order."""
    return torch.arange(n) * GROUPS // n


def recall_without(real: Tensor, fake: Tensor, k: int) -> Tensor:
    """Recall (GROUPS,) with each group of ``fake`` left out and the k-th neighbours found among the rest."""
    group, radii = group_of(len(fake)), torch.full((GROUPS, len(fake)), -1.0, dtype=torch.float64)
    for g in range(GROUPS):
        radii[g, group != g] = nearest_squared(fake[group != g], k)[:, k - 1]
    distances, inside = Distances(real, fake), torch.zeros(GROUPS, dtype=torch.float64)
    for rows in tiles(len(real), len(fake)):
        tile = distances.tile(rows)
        inside += torch.stack([(tile <= radius).any(dim=1).sum() for radius in radii])
    return inside / len(real)


def coverage_without(real: Tensor, fake: Tensor, radii: Tensor) -> Tensor:
    """Coverage (GROUPS,) with each group of ``fake`` left out; ``radii`` (M,) are squared and of the real images."""
    group, distances, covered = group_of(len(fake)), Distances(real, fake), torch.zeros(GROUPS, dtype=torch.float64)
    for rows in tiles(len(real), len(fake)):
        in_real = distances.tile(rows) <= radii[rows, None]
        by_group = torch.stack([in_real[:, group == g].any(dim=1) for g in range(GROUPS)])
        covered += torch.stack([by_group[torch.arange(GROUPS) != g].any(dim=0).sum() for g in range(GROUPS)])
    return covered / len(real)


def generated_noise(pair: Pair, name: str, k: int, real_radii: Tensor, counts: Counts) -> Tensor | float:
    """``sum_g xi_bg (m_(g) - mean m) ((G - 1) / G)^(1/2)`` (B,), with m_(g) the metric without group g and xi standard normal.

    Its variance is that of the grouped jackknife (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans). Of N
    > ``MOST`` images the first ``MOST`` are used and the variance is scaled by ``MOST / N``. It errs on the wide side: part
    of it is in the resampled reference too. 0 without ``counts.noise``, and for too few images to leave some out.
    """
    n = len(pair.fake)
    used = min(n, MOST)
    if counts.noise is None or used - -(-used // GROUPS) <= k:
        return 0.0
    real, fake = pair.real.features, pair.fake.features[:used]
    without = recall_without(real, fake, k) if name == "recall" else coverage_without(real, fake, real_radii)
    scale = ((GROUPS - 1) / GROUPS * used / n) ** 0.5
    noise: Tensor = counts.noise @ (without - without.mean()) * scale
    return noise
