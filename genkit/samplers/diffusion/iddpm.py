"""The ancestral step with a wider or learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genkit.denoiser import Condition
from genkit.noise import VP, Path
from genkit.samplers.diffusion.euler import euler, split
from genkit.samplers.diffusion.loop import SAMPLERS, Sampler, Step, direction, register
from genkit.samplers.diffusion.process import Process


def step_down(step: Step, x: Tensor, eta: float, fraction: Callable[[], float | Tensor]) -> Tensor:
    """Posterior mean plus noise of variance ``v = eta^2 beta^f beta_tilde^(1 - f)``; ``fraction`` is asked after the evaluation.

    A score moves the mean by ``v score`` (Dhariwal & Nichol 2021, alg. 1), x being on the vp path.
    """
    here, there, (down, up) = step.here, step.there, split(step, eta)
    if up == 0:
        return euler(step, x, None)[0]
    result = step.denoise(x, keep_score=True)
    mean = there.alpha * (result.denoised + down * direction(x, result, here))
    # beta / beta_tilde = (1 - abar) / (1 - abar'), and 1 - abar = sigma^2 / (1 + sigma^2) on the vp path
    wider = VP(here.sigma)[1] / VP(there.sigma)[1]
    f = fraction()
    factor = torch.exp(f * math.log(wider)) if isinstance(f, Tensor) else wider**f
    if result.score is not None:
        vp_score = (here.s / VP(here.sigma)[1]) * result.score
        mean = mean + (there.alpha * VP(there.sigma)[0]) * (up * factor) ** 2 * vp_score
    return mean + (there.alpha * up) * factor * step.draw(x)


@register("iddpm", order=1, offers=("direction",), eta=1.0, fraction=0.0)
def iddpm(step: Step, x: Tensor, memory: Any, eta: float, fraction: float) -> tuple[Tensor, Any]:
    """DDPM ancestral step with variance ``beta^f beta_tilde^(1 - f)`` (Nichol & Dhariwal 2021, eq. 15).

    ``beta = 1 - abar / abar'`` and ``beta_tilde = beta (1 - abar') / (1 - abar)`` between neighbouring levels of the grid.
    ``fraction`` f: 0 is the posterior variance ("fixed small", as euler_ancestral), 1 is beta ("fixed large"). A network that
    learned f decides for each pixel: see :func:`learned_range`. eta scales the noise as in DDIM.
    """
    return step_down(step, x, eta, lambda: fraction), None


class LearnedRange:
    """A denoiser from a network with 2C outputs, eps and v: ``D = (x - s eps) / alpha``, ``f = (v + 1) / 2``.

    It keeps f of its last call, and for :func:`learned_range` those of a step; so it serves one run at a time.

    Args:
        network: called as ``network(x, t, condition)``, x on the vp path, t (B,) the timesteps it was trained with, times
            1000 / T where ``rescale``.
        process: the chain the network was trained for, or a respaced part of it. Noise levels between its own go to the nearest.
        clip: clamp D to [-1, 1].
        rescale: whether timesteps are scaled to 0 ... 1000.
    """

    path: Path = VP

    def __init__(
        self, network: Callable[[Tensor, Tensor, Any], Tensor], process: Process, clip: bool = False, rescale: bool = False
    ) -> None:
        self.network, self.process, self.clip, self.rescale = network, process, clip, rescale
        self.fraction: Tensor | None = None
        self.recorded: list[tuple[Tensor, Tensor]] | None = None  # (sigma, f) of every call, where a step asks for it

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        index = self.process.index(sigma)
        times = self.process.timesteps.to(x.device)[index]
        output = self.network(x, times * (1000.0 / self.process.total) if self.rescale else times, condition)
        eps, v = output.chunk(2, dim=1)
        self.fraction = (v + 1) / 2
        if self.recorded is not None:
            self.recorded.append((sigma, self.fraction))
        denoised = self.process.denoised(x, eps.to(x), index)
        return denoised.clamp(-1, 1) if self.clip else denoised


def learned_range(denoiser: LearnedRange) -> Sampler:
    """The ``iddpm`` sampler with the variance its denoiser learned.

    That is the one of the step's first evaluation at its own noise level, over the whole batch: of the conditional branch, which
    stands first. In a run it raises ValueError where a step has none.
    """

    def step(step: Step, x: Tensor, memory: Any, eta: float, fraction: float) -> tuple[Tensor, Any]:
        found: list[tuple[Tensor, Tensor]] = []
        denoiser.recorded = found

        def learned() -> Tensor:
            for sigma, f in found:
                if len(f) >= len(x) and math.isclose(float(sigma[0]), step.here.sigma, rel_tol=1e-6):
                    return f[: len(x)].to(x)
            raise ValueError(
                f"learned_range: the guidance did not evaluate the network over the whole batch at sigma={step.here.sigma:.4g}, "
                "so this step has no learned variance; leave out what skips the evaluation (ZeroInit), or use sampler='iddpm'"
            )

        try:
            return step_down(step, x, eta, learned), None
        finally:
            denoiser.recorded = None

    return replace(SAMPLERS["iddpm"], name="iddpm with learned range", step=step)


__all__ = ["LearnedRange", "iddpm", "learned_range"]
