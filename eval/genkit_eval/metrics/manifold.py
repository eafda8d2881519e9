"""Precision, recall, density and coverage from k-nearest-neighbour balls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit_eval.metrics.counts import GROUPS, Counts
from genkit_eval.metrics.leaveout import MOST, generated_noise
from genkit_eval.metrics.pairwise import Distances, nearest_squared, tiles
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

PR_K, DC_K = 3, 5
OVER = {
    "generated": "generated images; reference fixed",
    "reference": f"reference images, and a jackknife over {GROUPS} groups of generated ones (first {MOST:,} at most, scaled)",
}


@dataclass(frozen=True)
class Manifold:
    """Shares of each image: ``precision`` and ``density`` (N,) of generated, ``recall`` and ``coverage`` (M,) of real ones."""

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def squared_radii(sample: Sample, k: int) -> Tensor:
    """Squared distance (N,) from each image to its k-th nearest other one."""
    most = min(max(k, PR_K, DC_K), len(sample) - 1)
    if k > most:
        raise ValueError(f"k: got {k} for {len(sample)} images; at most {most} works")
    return sample.once(("nearest", most), lambda: nearest_squared(sample.features, most))[:, k - 1]


def manifold(pair: Pair, k: int) -> Manifold:
    """All four from one pass over real x generated, with ``<=`` against the k-th neighbour's distance (self excluded).

    precision: a generated image lies in some real ball; density: number of real balls around it, over k; recall: a real image is
    in some generated ball; coverage: a real image's ball holds a generated one.
    Kynkaanniemi et al. 2019, eq. 1-2; Naeem et al. 2020, eq. 4-5 (which writes ``<``; the two differ only on tied distances).
    """
    real_radii, fake_radii = squared_radii(pair.real, k), squared_radii(pair.fake, k)
    distances = Distances(pair.real.features, pair.fake.features)
    balls = torch.zeros(len(pair.fake), dtype=torch.float64)
    recall, coverage = [], []
    for rows in tiles(len(pair.real), len(pair.fake)):
        tile = distances.tile(rows)
        in_real = distances.within(rows, tile, real_radii[rows, None])
        balls += in_real.sum(dim=0)
        coverage.append(in_real.any(dim=1))
        recall.append(distances.within(rows, tile, fake_radii[None, :]).any(dim=1))
    return Manifold((balls > 0).double(), balls / k, torch.cat(recall).double(), torch.cat(coverage).double())


def _register(name: str, protocol: str, k: int, over: str) -> None:
    def contributions(pair: Pair) -> Tensor:
        rows: Tensor = getattr(pair.once(("manifold", k), lambda: manifold(pair, k)), name)
        return rows

    def replicates(pair: Pair, counts: Counts) -> Tensor:
        rows = contributions(pair)
        if over == "generated":
            return counts.fake @ rows / rows.numel()
        return counts.real @ rows / rows.numel() + generated_noise(pair, name, k, squared_radii(pair.real, k), counts)

    value: Callable[[Pair], float] = lambda pair: float(contributions(pair).mean())  # noqa: E731
    register(
        Spec(
            name=name,
            title=name.capitalize(),
            variant=f"{protocol}/exact/k{k}",
            better="higher",
            source="features",
            value=value,
            replicates=replicates,
            interval_of=OVER[over],
            ideal=None if name == "density" else 1.0,
            bounds=(0.0, torch.inf if name == "density" else 1.0),
        )
    )


_register("precision", "pr", PR_K, "generated")
_register("recall", "pr", PR_K, "reference")
_register("density", "dc", DC_K, "generated")
_register("coverage", "dc", DC_K, "reference")
