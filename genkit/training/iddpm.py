"""Losses and timestep sampling of improved DDPM."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.samplers.diffusion.likelihood import vlb_term
from genkit.samplers.diffusion.process import Process


class HybridLoss(NamedTuple):
    """Per sample (B,): ``loss = mse + weight vlb``, and its two parts (``vlb`` in bits per dimension, not weighted)."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor


def reverse_step(process: Process, output: Tensor, x: Tensor, t: Tensor, fraction: float | None) -> tuple[Tensor, Tensor]:
    """(mean, log_variance) from the output of a network: C channels with a fixed fraction, 2C without one."""
    if fraction is None:
        eps, v = output.chunk(2, dim=1)
        mean = process.posterior_mean(process.denoised(x, eps, t), x, t)
        return mean, process.log_variance(t, x, (v + 1) / 2)
    return process.posterior_mean(process.denoised(x, output, t), x, t), process.log_variance(t, x, fraction)


def vlb_loss(process: Process, output: Tensor, x0: Tensor, x: Tensor, t: Tensor, fraction: float | None = None) -> Tensor:
    """(B,) the bound's term at step t in bits per dimension, with its gradient to mean and variance; times T for the sum."""
    mean, log_variance = reverse_step(process, output, x, t, fraction)
    return vlb_term(process, x0, x, t, mean, log_variance)


def hybrid_loss(
    process: Process, output: Tensor, x0: Tensor, x: Tensor, t: Tensor, noise: Tensor, weight: float | None = None
) -> HybridLoss:
    """``|eps - noise|^2 + weight L_vlb`` (Nichol & Dhariwal 2021, eq. 16); the bound teaches the variance alone.

    Args:
        process: the chain.
        output: (B, 2C, ...) of the network: eps and v, the variance fraction being ``(v + 1) / 2``.
        x0, x, t, noise: clean images (B, C, ...), ``process.noised(x0, noise, t)``, steps (B,), and the noise.
        weight: of the bound's term in bits per dimension; None is T / 1000, as published.
    """
    eps, v = output.chunk(2, dim=1)
    vlb = vlb_loss(process, torch.cat([eps.detach(), v], 1), x0, x, t)
    mse = (noise - eps).square().flatten(1).mean(1)
    return HybridLoss(mse + (len(process) / 1000 if weight is None else weight) * vlb, mse, vlb)


class ImportanceSampler:
    """Draws timesteps with ``p_t ~ sqrt(E[L_t^2])`` over the last losses of each (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every timestep has a full history.

    Args:
        steps: T.
        history: losses kept of each timestep.
        uniform: share of the uniform law mixed in, from 0 to 1.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001) -> None:
        self.uniform, self.losses = uniform, np.zeros((steps, history))
        self.counts = np.zeros(steps, dtype=np.int64)

    @property
    def weights(self) -> np.ndarray:
        """(T,) proportional to the probabilities: ones until warmed up."""
        steps, history = self.losses.shape
        if (self.counts < history).any():
            return np.ones(steps)
        root = np.sqrt((self.losses**2).mean(1))
        mixed: np.ndarray = root / root.sum() * (1 - self.uniform) + self.uniform / steps
        return mixed

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,), and the weights (B,) that make the mean of ``weight * loss`` an unbiased mean over all timesteps."""
        p = torch.from_numpy(self.weights / self.weights.sum())
        t = torch.multinomial(p, batch, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses (B,) of the timesteps (B,)."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[step, self.counts[step] % self.losses.shape[1]] = loss
            self.counts[step] += 1


__all__ = ["HybridLoss", "ImportanceSampler", "hybrid_loss", "vlb_loss"]
