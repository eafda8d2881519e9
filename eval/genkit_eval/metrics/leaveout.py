"""Spread of recall and coverage over the generated sample: groups of its images left out in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts, jackknife
from genkit_eval.metrics.pairwise import nearest, within
from genkit_eval.metrics.sample import Pair

GROUPS = 5
# Neighbours among the generated images cost the square of their number: of more images, these many stand for all.
MOST = 3000


def recall_without(real: Tensor, fake: Tensor, k: int, group: Tensor) -> Tensor:
    """Recall (GROUPS,) with each group of ``fake`` left out and the k-th neighbours found among the rest."""
    radii = torch.full((len(fake), GROUPS), -1.0, dtype=torch.float64)
    for g in range(GROUPS):
        radii[group != g, g] = nearest(fake[group != g], k=k)[0][:, -1]
    inside = torch.zeros(len(real), GROUPS, dtype=torch.bool)
    for close in within(real, fake, torch.zeros(len(real), 0), radii):
        for g in range(GROUPS):
            inside[close.i[close.inside[:, g]], g] = True
    return inside.double().mean(dim=0)


def coverage_without(real: Tensor, fake: Tensor, radii: Tensor, group: Tensor) -> Tensor:
    """Coverage (GROUPS,) with each group of ``fake`` left out; ``radii`` (M,) are squared and of the real images."""
    by_group = torch.zeros(len(real), GROUPS, dtype=torch.bool)
    for close in within(real, fake, radii[:, None], torch.zeros(len(fake), 0)):
        here = close.inside[:, 0]
        by_group[close.i[here], group[close.j[here]]] = True
    held = by_group.sum(dim=1, keepdim=True)
    return (held - by_group.long() > 0).double().mean(dim=0)


def generated_noise(pair: Pair, name: str, k: int, real_radii: Tensor, counts: Counts) -> Tensor | float:
    """Jackknife spread (B,) of ``recall`` or ``coverage`` over ``GROUPS`` groups of generated images; 0 where they are too few.

    Of N > ``MOST`` images ``MOST`` are used and the variance is scaled by ``MOST / N``. It errs on the wide side: part of it is
    in the resampled reference too.
    """
    n = len(pair.fake)
    used = min(n, MOST)
    if used - -(-used // GROUPS) <= k:
        return 0.0
    real, fake = pair.real.features, pair.fake.features[torch.arange(used) * n // used]

    def without(group: Tensor) -> Tensor:
        return recall_without(real, fake, k, group) if name == "recall" else coverage_without(real, fake, real_radii, group)

    return jackknife(used, without, counts, GROUPS) * float((used / n) ** 0.5)
