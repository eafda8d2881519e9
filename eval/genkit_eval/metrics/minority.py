"""Minority score: how rare images are, by a score of each that is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair

LAYER = "minority"


def minority_layer(score: Callable[[Tensor, Tensor, int], Tensor], pixels: Tensor, labels: Tensor, batch: int = 250) -> Tensor:
    """The layer "minority" (N, 1) of uint8 images (N, 3, H, W) with labels (N,).

    ``score(pixels, labels, first)`` gives (B,) scores, higher for rarer images, of the images that are number ``first`` and
    following (so that its noise can be theirs); ``genkit.guidance.minority.minority_score`` makes them for a denoiser:
    the distance between an image and what the model restores from it under noise. Um et al. 2024.
    """
    parts = zip(range(0, len(pixels), batch), pixels.split(batch), labels.split(batch), strict=True)
    with torch.no_grad():
        found = torch.cat([score(some, their, first).flatten().cpu() for first, some, their in parts])
    if len(found) != len(pixels):
        raise ValueError(f"score: got {len(found)} numbers for {len(pixels)} images; one for each image works")
    return found[:, None]


def _scores(pair: Pair) -> Tensor:
    return pair.fake.layer(LAYER).features.double().mean(dim=1)


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    return counts.fake @ _scores(pair) / len(pair.fake)


register(
    Spec(
        name="minority",
        title="Minority score",
        variant="minority/mean",
        better="neither",
        source="features",
        value=lambda pair: float(_scores(pair).mean()),
        replicates=_replicates,
        interval_of="generated images",
        layer=LAYER,
        reference="none",
        standard=False,
    )
)
