"""Precision, recall, density and coverage from k-nearest-neighbour balls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.leaveout import GROUPS, MOST, generated_noise
from genkit_eval.metrics.pairwise import nearest, within
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair, Sample

PR_K, DC_K = 3, 5
OVER = {
    "generated": "generated images; reference fixed",
    "reference": f"reference images, and a jackknife over {GROUPS} groups of generated ones ({MOST:,} at most, scaled)",
}


@dataclass(frozen=True)
class Manifold:
    """Shares of each image: ``precision`` and ``density`` (N,) of generated, ``recall`` and ``coverage`` (M,) of real ones."""

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def squared_radii(sample: Sample, k: int) -> Tensor:
    """Squared distance (N,) from each image to its k-th nearest other one; ValueError for k images or fewer."""
    n = len(sample.features)
    most = min(max(k, PR_K, DC_K), n - 1)
    if not 1 <= k <= most:
        raise ValueError(f"k: got {k} for {n} images; 1 to {most} works")
    return sample.once(("nearest", most), lambda: nearest(sample.features, k=most)[0])[:, k - 1]


def manifolds(pair: Pair, ks: tuple[int, ...], strict: bool = False) -> dict[int, Manifold]:
    """All four for each k from one pass over real x generated, with ``<=`` (``<`` where ``strict``).

    The ball of an image reaches its k-th nearest other one. precision: a generated image lies in some real ball; density: number
    of real balls around it, over k; recall: a real image is in some generated ball; coverage: a real ball holds a generated one.
    Kynkaanniemi et al. 2019, eq. 1-2 (``<=``); Naeem et al. 2020, eq. 4-5 (``<``); they differ on tied distances alone.
    """
    real, fake = (torch.stack([squared_radii(s, k) for k in ks], dim=1) for s in (pair.real, pair.fake))
    balls = torch.zeros(len(fake), len(ks), dtype=torch.float64)
    covered, recalled = (torch.zeros(len(real), len(ks), dtype=torch.bool) for _ in range(2))
    for axis, i, j, inside in within(pair.real.features, pair.fake.features, real, fake, strict):
        for at in range(len(ks)):
            here = inside[:, at]
            if axis == "rows":
                balls[:, at] += torch.bincount(j[here], minlength=len(fake))
                covered[i[here], at] = True
            else:
                recalled[i[here], at] = True
    recall, coverage = recalled.double(), covered.double()
    return {k: Manifold((balls[:, at] > 0).double(), balls[:, at] / k, recall[:, at], coverage[:, at]) for at, k in enumerate(ks)}


def manifold(pair: Pair, k: int, strict: bool = False) -> Manifold:
    """``manifolds`` for one k, found together with those that the registered metrics use."""
    smallest = min(len(pair.real), len(pair.fake))
    usual = (PR_K, DC_K) if k in (PR_K, DC_K) and smallest > DC_K else (k,)
    return pair.once(("manifold", usual, strict), lambda: manifolds(pair, usual, strict))[k]


def _register(name: str, protocol: str, k: int, over: str, strict: bool = False) -> None:
    def contributions(pair: Pair) -> Tensor:
        rows: Tensor = getattr(manifold(pair, k, strict), name)
        return rows

    def replicates(pair: Pair, counts: Counts) -> Tensor:
        rows = contributions(pair)
        if over == "generated":
            return counts.fake @ rows / rows.numel()
        return counts.real @ rows / rows.numel() + generated_noise(pair, name, k, squared_radii(pair.real, k), counts)

    value: Callable[[Pair], float] = lambda pair: float(contributions(pair).mean())  # noqa: E731
    register(
        Spec(
            name=f"{name}_strict" if strict else name,
            title=f"{name.capitalize()} (<)" if strict else name.capitalize(),
            variant=f"{protocol}/exact{'-lt' if strict else ''}/k{k}",
            better="higher",
            source="features",
            value=value,
            replicates=replicates,
            interval_of=OVER[over],
            ideal=None if name == "density" else 1.0,
            bounds=(0.0, torch.inf if name == "density" else 1.0),
            least=k + 1,
            standard=not strict,
        )
    )


_register("precision", "pr", PR_K, "generated")
_register("recall", "pr", PR_K, "reference")
_register("density", "dc", DC_K, "generated")
_register("coverage", "dc", DC_K, "reference")
# As prdc and dgm-eval count: an image exactly on the rim is outside.
_register("density", "dc", DC_K, "generated", strict=True)
_register("coverage", "dc", DC_K, "reference", strict=True)
