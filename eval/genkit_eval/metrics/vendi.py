"""Vendi score: the effective number of different images in a set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit_eval.metrics.counts import GROUPS, Counts, jackknife
from genkit_eval.metrics.pairwise import steps
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample


def gram(x: Tensor) -> Tensor:
    """``sum_i u_i u_i^T`` (D, D) float64 of the rows scaled to length 1."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in steps(len(x)):
        unit = torch.nn.functional.normalize(x[part].double(), dim=1)
        total.addmm_(unit.T, unit)
    return total


def vendi(total: Tensor, n: int, q: float = 1.0) -> float:
    """Exponential of the Renyi entropy of order ``q`` of the eigenvalues of the similarities over n, by the dual matrix.

    ``total`` is ``gram`` of n images: D x D, with the eigenvalues of the N x N similarities. q = 1 is Shannon's entropy, q = inf
    one over the largest eigenvalue. Friedman and Dieng 2023; Pasarkar and Dieng 2024 for q.
    """
    values = torch.linalg.eigvalsh(total / n)
    values = values[values > 0]
    if q == 1:
        return float(torch.exp(-(values * values.log()).sum()))
    if math.isinf(q):
        return float(1 / values.max())
    return float(values.pow(q).sum().pow(1 / (1 - q)))


def _gram(sample: Sample) -> Tensor:
    return sample.once("gram", lambda: gram(sample.features))


def _value(pair: Pair) -> float:
    return pair.fake.once("vendi", lambda: vendi(_gram(pair.fake), len(pair.fake)))


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    x, n = pair.fake.features, len(pair.fake)

    def without(group: Tensor) -> Tensor:
        parts = ((x[group == g], int((group != g).sum())) for g in range(GROUPS))
        return torch.tensor([vendi(_gram(pair.fake) - gram(part), rest) for part, rest in parts], dtype=torch.float64)

    return torch.full((len(counts.fake),), _value(pair), dtype=torch.float64) + jackknife(n, without, counts)


register(
    Spec(
        name="vendi",
        title="Vendi-{extractor}",
        variant="vendi/cosine/q1",
        better="higher",
        source="features",
        value=_value,
        replicates=_replicates,
        interval_of=f"generated images, {GROUPS} groups left out in turn (copies of one image would count as less variety)",
        bounds=(1.0, torch.inf),
        reference="none",
        standard=False,
    )
)
