"""CMMD: maximum mean discrepancy of CLIP embeddings under a Gaussian kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.kernels import ones, row_means, weighted_sum
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

LAYER, SIGMA, SCALE = "clip", 10.0, 1000.0


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """``exp(-|x - y|^2 / (2 sigma^2)) - 1``, sigma = 10.

    Of unit vectors ``exp`` lies within 2 % of 1: its difference to 1 keeps the digits that the distance is made of.
    """
    xn, yn = (part.square().sum(dim=1) for part in (x, y))
    squared = torch.addmm(yn, x, y.T, alpha=-2).add_(xn[:, None]).clamp_(min=0)
    return squared.mul_(-1 / (2 * SIGMA**2)).expm1_()


def unit_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``kernel`` of rows scaled to length 1."""
    return kernel(torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1))


def _within(sample: Sample) -> float:
    x = sample.features
    return sample.once("cmmd", lambda: float(weighted_sum(unit_kernel, x, ones(x), diagonal=True)) / len(x) ** 2)


def _across(pair: Pair) -> Tensor:
    return pair.once("cmmd", lambda: row_means(unit_kernel, pair.fake.features, pair.real.features))


def cmmd(pair: Pair) -> float:
    """``1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))`` over all pairs, an image with itself included.

    Jayasumana et al. 2024 and their evaluator: a biased estimate, 0 for identical sets.
    """
    return SCALE * (_within(pair.real) + _within(pair.fake) - 2 * float(_across(pair).mean()))


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    n, weight = len(pair.fake), counts.fake
    inner = weighted_sum(unit_kernel, pair.fake.features, weight, diagonal=True) / n**2
    return SCALE * (_within(pair.real) + inner - 2 * (weight @ _across(pair)) / n)


register(
    Spec(
        name="cmmd",
        title="CMMD",
        variant="cmmd/rbf-sigma10/x1000",
        better="lower",
        source="features",
        value=lambda pair: cmmd(pair.of(LAYER)),
        replicates=lambda pair, counts: _replicates(pair.of(LAYER), counts),
        interval_of="generated images; reference fixed; expectation at this sample count",
        ideal=0.0,
        bounds=(0.0, torch.inf),
        layer=LAYER,
        standard=False,
    )
)
