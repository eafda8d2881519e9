"""Discrete diffusion chains: schedules of beta, respacing, and the two ends of a reverse step's variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


def linear_betas(steps: int) -> Tensor:
    """``beta`` from 0.1 / T to 20 / T, equally spaced (Ho et al. 2020: T = 1000). Raises ValueError for fewer than 21."""
    if steps <= 20:
        raise ValueError(f"steps={steps}: the linear schedule ends at beta = 20 / steps, which must be below 1; use at least 21")
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> Tensor:
    """``abar(u) = cos^2((u + 0.008) / 1.008 pi / 2)``, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    if steps < 1:
        raise ValueError(f"steps={steps}: use at least 1")
    abar = torch.cos((torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)


def spaced(total: int, sections: str | Sequence[int]) -> list[int]:
    """The timesteps to keep of a chain of ``total``, rising.

    Args:
        sections: how many to keep of each of as many equal parts, first and last of a part included: ``[10, 15, 20]`` or
            ``"10,15,20"``; or ``"ddimN"``: every k-th from 0 on, with the k that keeps N.

    Raises:
        ValueError: a part that is shorter than what is to be kept of it, or no k that keeps N.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        number = sections.removeprefix("ddim")
        wanted = int(number) if number.isdecimal() else 0
        for stride in range(1, total):
            if len(range(0, total, stride)) == wanted:
                return list(range(0, total, stride))
        raise ValueError(f"sections={sections!r}: no whole stride keeps {wanted} of {total} timesteps")
    try:
        counts = [int(c) for c in (sections.split(",") if isinstance(sections, str) else sections)]
    except (TypeError, ValueError):
        counts = []
    if not counts:
        raise ValueError(f"sections={sections!r}: give one number for each part, such as [50] or '10,15,20', or 'ddim50'")
    size, extra = divmod(total, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"sections={sections!r}: {count} of a part of {length} timesteps cannot be kept")
        step = (length - 1) / (count - 1) if count > 1 else 1.0
        # step by step, as published: a half rounds by the error it has gathered
        kept += [start + round(place) for place in itertools.accumulate([0.0] + [step] * (count - 1))]
        start += length
    return kept


class Process:
    """A chain ``q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)``, t = 0 ... T - 1; everything in float64.

    Args:
        betas: (T,), each in (0, 1).
        timesteps: (T,) what the network calls the steps; None is 0 ... T - 1.
        total: T of the chain the network was trained for.
    """

    def __init__(self, betas: Tensor, timesteps: Sequence[int] | None = None, total: int | None = None) -> None:
        self.betas = betas.double().cpu()
        if self.betas.ndim != 1 or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.timesteps = torch.tensor(range(len(betas)) if timesteps is None else timesteps)
        self.total = len(betas) if total is None else total

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """``abar_t``: alpha^2 of the vp path."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def previous(self) -> Tensor:
        """``abar_{t-1}``, 1 at t = 0."""
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """``beta_tilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)``, 0 at t = 0."""
        return self.betas * (1 - self.previous) / (1 - self.alphas_cumprod)

    @cached_property
    def log_range(self) -> tuple[Tensor, Tensor]:
        """``ln beta_tilde`` and ``ln beta``: the ends of the learned range. At t = 0 the first is that of t = 1."""
        small = self.posterior_variance
        return torch.cat([small[1:2] if len(small) > 1 else self.betas[:1], small[1:]]).log(), self.betas.log()

    @cached_property
    def mean_coefficients(self) -> tuple[Tensor, Tensor]:
        """Of x0 and x_t in the mean of ``q(x_{t-1} | x_t, x0)``."""
        rest = 1 - self.alphas_cumprod
        return self.betas * self.previous.sqrt() / rest, (1 - self.previous) * (1 - self.betas).sqrt() / rest

    @property
    def sigmas(self) -> Tensor:
        """(T + 1,) the grid of a run through the whole chain: noise levels ``sqrt((1 - abar) / abar)``, falling, then 0."""
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        return torch.cat([levels.flip(0), levels.new_zeros(1)])

    def respaced(self, timesteps: Sequence[int]) -> Process:
        """The chain over some of the timesteps, with ``beta_k = 1 - abar_k / abar_{k-1}``; see :func:`spaced`.

        Raises:
            ValueError: timesteps is empty, does not rise strictly, or leaves the chain.
        """
        bounded = [-1, *timesteps, len(self)]
        if len(timesteps) == 0 or any(a >= b for a, b in itertools.pairwise(bounded)):
            raise ValueError(f"timesteps={list(timesteps)[:8]}: give strictly rising steps of the chain's 0 to {len(self) - 1}")
        abar = self.alphas_cumprod[list(timesteps)]
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        return Process(1 - abar / before, self.timesteps[list(timesteps)].tolist(), self.total)

    def index(self, sigma: Tensor) -> Tensor:
        """The step whose noise level is nearest to ``sigma`` (B,), in ln sigma."""
        levels = self.sigmas[:-1].flip(0).log().to(sigma.device)
        return (sigma.double().log()[:, None] - levels).abs().argmin(1)

    def at(self, values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """``values[t]``, shaped to be multiplied with ``like`` (B, ...)."""
        return values.to(t.device)[t].reshape(-1, *[1] * (like.ndim - 1)).to(like)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise``."""
        abar = self.alphas_cumprod
        return self.at(abar.sqrt(), t, x0) * x0 + self.at((1 - abar).sqrt(), t, x0) * noise

    def denoised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``(x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)``; :func:`genkit.noise.to_x0` for a step of its own in each row."""
        abar = self.alphas_cumprod
        return self.at(abar.rsqrt(), t, x) * x - self.at((1 / abar - 1).sqrt(), t, x) * eps

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean of ``q(x_{t-1} | x_t = x, x0)`` (Ho et al. 2020, eq. 7)."""
        first, second = self.mean_coefficients
        return self.at(first, t, x) * x0 + self.at(second, t, x) * x

    def log_variance(self, t: Tensor, like: Tensor, fraction: float | Tensor = 0.0) -> Tensor:
        """``f ln beta + (1 - f) ln beta_tilde`` (Nichol & Dhariwal 2021, eq. 15).

        At f = 1 ("fixed large") the first step has beta_tilde of the second, as published; a learned f has the whole range there.
        """
        small, large = self.log_range
        if not isinstance(fraction, Tensor) and fraction == 1:
            large = torch.cat([small[:1], large[1:]])
        low, high = self.at(small, t, like), self.at(large, t, like)
        return (low + fraction * (high - low)).expand_as(like)


__all__ = ["Process", "cosine_betas", "linear_betas", "spaced"]
