"""Inception score: how sure the classifier is of each image, and how unlike its answers are."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.pairwise import steps
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

LAYER = "logits"
TF_SPLITS, TF_SEED, ADM_SPLIT = 10, 2020, 5000


def equal_splits(n: int, splits: int = TF_SPLITS, seed: int | None = TF_SEED) -> list[Tensor]:
    """Indices of each of ``splits`` parts as torch-fidelity 0.4 cuts them, shuffled by RandomState(seed); None: not."""
    order = np.arange(n)
    if seed is not None:
        np.random.RandomState(seed).shuffle(order)
    edges = [i * n // splits for i in range(splits + 1)]
    return [torch.from_numpy(order[a:b]) for a, b in pairwise(edges)]


def consecutive_splits(n: int, size: int = ADM_SPLIT) -> list[Tensor]:
    """Indices of consecutive parts of ``size`` in the order given, the last one shorter: as ADM's evaluator cuts them."""
    return list(torch.arange(n).split(size))


def split_scores(logits: Tensor, splits: list[Tensor], weights: Tensor | None = None) -> Tensor:
    """``exp(mean KL(p(y|x) || p(y)))`` (B, splits) within each split, from log-softmax in float64.

    Never NaN: a probability too small for float64 has p log p = 0. ``weights`` (B, N) count each image; default once (B = 1).
    Salimans et al. 2016, section 4; splits as in their code. ValueError for a split without images.
    """
    if any(len(split) == 0 for split in splits):
        raise ValueError(f"splits: {len(splits)} parts of {len(logits)} images leave one empty; fewer splits work")
    weights = torch.ones(1, len(logits), dtype=torch.float64) if weights is None else weights
    found = []
    for split in splits:
        weight = weights[:, split]
        mean, inner = (
            torch.zeros(len(weight), logits.shape[1], dtype=torch.float64),
            torch.zeros(len(weight), dtype=torch.float64),
        )
        for part in steps(len(split)):
            log_p = logits[split[part]].double().log_softmax(dim=1)
            p = log_p.exp()
            mean += weight[:, part] @ p
            inner += weight[:, part] @ (p * log_p).sum(dim=1)
        total = weight.sum(dim=1)
        mean = mean / total[:, None]
        found.append((inner / total - torch.special.xlogy(mean, mean).sum(dim=1)).exp())
    return torch.stack(found, dim=1)


def warn_if_sorted(labels: Tensor | None, size: int) -> None:
    """Warn where images sorted by class would be scored in parts of ``size``: each holds few classes and scores far too low."""
    if labels is not None and len(labels) > size and bool((labels.diff() >= 0).all()) and bool(labels[0] != labels[-1]):
        warnings.warn(
            f"the images are sorted by class and the Inception score is taken over parts of {size:,} in their order: it comes "
            "out far too low; shuffle the images, or use inception_score, which shuffles them itself",
            stacklevel=2,
        )


def _register(name: str, title: str, variant: str, cut: str, standard: bool) -> None:
    def splits(fake: Sample) -> list[Tensor]:
        n = len(fake)
        return {"tf": equal_splits, "one": lambda n: [torch.arange(n)], "adm": consecutive_splits}[cut](n)

    def scores(pair: Pair) -> Tensor:
        fake = pair.fake.layer(LAYER)
        if cut == "adm":
            warn_if_sorted(fake.labels, ADM_SPLIT)
        return fake.once(name, lambda: split_scores(fake.features, splits(fake))[0])

    def replicates(pair: Pair, counts: Counts) -> Tensor:
        fake = pair.fake.layer(LAYER)
        return split_scores(fake.features, splits(fake), counts.fake).mean(dim=1)

    register(
        Spec(
            name=name,
            title=title,
            variant=variant,
            better="higher",
            source="features",
            value=lambda pair: float(scores(pair).mean()),
            replicates=replicates,
            interval_of="generated images",
            bounds=(1.0, torch.inf),
            layer=LAYER,
            reference="none",
            least=4 * TF_SPLITS if cut == "tf" else 2,
            standard=standard,
        )
    )


_register("inception_score", "IS", f"is/tf-splits{TF_SPLITS}/seed{TF_SEED}", "tf", True)
_register("inception_score_whole", "IS (1 split)", "is/splits1", "one", False)
_register("inception_score_adm", "IS (ADM)", f"is/adm-order/{ADM_SPLIT}", "adm", False)
