"""CLIP score: how well images match the texts they were made from."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair

IMAGE, TEXT = "clip", "text"


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """``max(100 cos(image, text), 0)`` (N,) float64 of embeddings (N, D), row by row.

    Hessel et al. 2021, section 3, with the factor 100 that torchmetrics and most tables use (the paper's is 2.5).
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"texts: got {tuple(texts.shape)} for images {tuple(images.shape)}; one text embedding for each image works"
        )
    return 100 * torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1).clamp(min=0)


def _scores(pair: Pair) -> Tensor:
    images, texts = (pair.fake.layer(name).features for name in (IMAGE, TEXT))
    return pair.fake.once("clip_score", lambda: clip_scores(images, texts))


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    return counts.fake @ _scores(pair) / len(pair.fake)


register(
    Spec(
        name="clip_score",
        title="CLIP score",
        variant="clip-score/100cos",
        better="higher",
        source="features",
        value=lambda pair: float(_scores(pair).mean()),
        replicates=_replicates,
        interval_of="generated images with their texts",
        bounds=(0.0, 100.0),
        layer=IMAGE,
        beside=TEXT,
        reference="none",
        standard=False,
    )
)
