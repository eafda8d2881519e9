"""Frechet distance extrapolated to infinitely many images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts, normal
from genkit_eval.metrics.frechet import Gaussian, between, frechet, frechet_replicates, gaussian, gaussian_of
from genkit_eval.metrics.moments import moments_of
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair

POINTS, REPEATS, SEED = 15, 4, 0


@dataclass(frozen=True)
class Extrapolation:
    """``value`` at 1/N = 0 and its ``standard_error``, from the mean ``distances`` at ``sizes``."""

    value: float
    standard_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def sizes_of(n: int, points: int = POINTS) -> list[int]:
    """Sizes of subsets, evenly from a tenth of the images (5,000 at most, 2 at least) to all n."""
    return [int(size) for size in np.linspace(min(5000, max(n // 10, 2)), n, points)]


def frechet_infinity(
    real: Gaussian, fake: Tensor, points: int = POINTS, repeats: int = REPEATS, seed: int = SEED
) -> Extrapolation:
    """Intercept of the least-squares line of FD_N against 1/N, over ``repeats`` random subsets at each of ``points`` sizes.

    Chong and Forsyth 2020, with Stein et al. 2023's sizes; all images make one subset alone. ``seed`` starts numpy's
    default generator. The standard error is the line's own: scatter of the means around it, not that of the images.
    """
    drawn, sizes, distances = np.random.default_rng(seed), sizes_of(len(fake), points), []
    for size in sizes:
        found = []
        for _ in range(repeats if size < len(fake) else 1):
            part = fake[torch.from_numpy(drawn.choice(len(fake), size, replace=False))]
            found.append(between(real, gaussian(moments_of(part), part)))
        distances.append(sum(found) / len(found))
    x, y = 1 / np.array(sizes, dtype=np.float64), np.array(distances)
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    intercept = y.mean() - slope * x.mean()
    rest = y - intercept - slope * x
    variance = rest @ rest / (points - 2) * (1 / points + x.mean() ** 2 / (centred @ centred))
    return Extrapolation(float(intercept), float(variance**0.5), tuple(sizes), tuple(distances))


def _found(pair: Pair) -> Extrapolation:
    return pair.once("frechet_infinity", lambda: frechet_infinity(gaussian_of(pair.real), pair.fake.features))


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    """Deviations of the distance itself over the images, and the error of the line."""
    found = _found(pair)
    return found.value + frechet_replicates(pair, counts) - frechet(pair) + normal(counts, found.standard_error)


register(
    Spec(
        name="frechet_infinity",
        title="{fd} ∞",
        variant=f"{{fd}}-infinity/{POINTS}x{REPEATS}/seed{SEED}",
        better="lower",
        source="features",
        value=lambda pair: _found(pair).value,
        replicates=_replicates,
        interval_of="generated images (as the distance itself), and the standard error of the line; reference moments fixed",
        reference="moments",
        least=20,
        standard=False,
    )
)
