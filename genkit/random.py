"""Random numbers that belong to a sample, never to its batch: one generator per seed and purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[Tensor, int], Tensor]
"""A noise source: ``noise(like, step)`` returns unit-scale noise with the shape, dtype and device of ``like`` (B, ...)."""

MAX_SEED = 2**63 - 1


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list. Raises ValueError unless each is an integer in [0, 2^63)."""
    out = list(seeds)
    for seed in out:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds contains {seed!r}: each seed must be an integer from 0 to 2**63 - 1")
    return [int(seed) for seed in out]


def generator(seed: int, stream: int = 0, *key: int) -> torch.Generator:
    """A CPU generator for one sample and one purpose; streams of one seed are independent (NumPy's SeedSequence hash)."""
    state = np.random.SeedSequence([seed, stream, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & MAX_SEED)


class Gaussian:
    """``n ~ N(0, I)``, row b from the generator of ``seeds[b]`` alone.

    Stream 0 is the starting noise of a run and stream 1 what a sampler draws on its way, so a stochastic sampler starts
    where a deterministic one does. Numbers are drawn in float32 on the CPU: the same on every device and in every dtype.
    """

    def __init__(self, seeds: Sequence[int], stream: int = 0) -> None:
        self.generators = [generator(seed, stream) for seed in check_seeds(seeds)]

    def __call__(self, like: Tensor, step: int = 0) -> Tensor:
        if len(like) != len(self.generators):  # one row would be broadcast silently
            raise ValueError(
                f"noise for {len(self.generators)} seeds was asked for a batch of {len(like)}: give one seed per sample"
            )
        rows = [torch.randn(like.shape[1:], generator=g) for g in self.generators]
        return torch.stack(rows).to(like)


class StudentT:
    """Multivariate Student-t noise with ``degrees`` degrees of freedom: ``n = z / sqrt(chi2_D / D)``, one chi2 per sample.

    The kernel of PFGM++ (Xu et al. 2023) with augmented dimension D; D = inf is :class:`Gaussian`. D <= 2 has no variance.
    """

    def __init__(self, seeds: Sequence[int], degrees: float, stream: int = 0) -> None:
        if not degrees > 0:
            raise ValueError(f"degrees={degrees}: use a positive number (inf is Gaussian noise)")
        self.degrees, self.normal = degrees, Gaussian(seeds, stream)

    def __call__(self, like: Tensor, step: int = 0) -> Tensor:
        z = self.normal(like, step)
        if math.isinf(self.degrees):
            return z
        shape = torch.tensor([self.degrees / 2], dtype=torch.float64)
        chi2 = torch.stack([2 * torch._standard_gamma(shape, generator=g) for g in self.normal.generators])
        return z / (chi2 / self.degrees).sqrt().reshape(-1, *[1] * (like.ndim - 1)).to(z)


class Keyed:
    """``n ~ N(0, I)``, row b a function of ``seeds[b]`` and the key alone: no order of drawing, so nothing to resume."""

    def __init__(self, seeds: Sequence[int], stream: int = 2) -> None:
        self.seeds, self.stream = check_seeds(seeds), stream

    def __call__(self, like: Tensor, *key: int) -> Tensor:
        if len(like) != len(self.seeds):
            raise ValueError(f"noise for {len(self.seeds)} seeds was asked for a batch of {len(like)}: give one seed per sample")
        rows = [torch.randn(like.shape[1:], generator=generator(seed, self.stream, *key)) for seed in self.seeds]
        return torch.stack(rows).to(like)


class Fixed:
    """Noise given in advance: ``values[step]`` of shape (steps, B, ...), for tests and for replaying a run."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, like: Tensor, step: int = 0) -> Tensor:
        return self.values[step].to(like)
