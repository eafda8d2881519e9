"""DPM-Solver++(2M), of the probability flow and of the reverse diffusion."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.samplers.diffusion.loop import Step, direction, register


class Last(NamedTuple):
    """What the multistep formula remembers: the previous estimate, or direction, and the previous step in lambda = -ln sigma."""

    denoised: Tensor
    h: float


@register("dpmpp_2m", order=2, offers=("direction",))
def dpmpp_2m(step: Step, x: Tensor, memory: Last | None) -> tuple[Tensor, Last]:
    """Second-order multistep in x0 space, one evaluation a step (Lu et al. 2022b, alg. 2).

    ``x' = (s'/s) x + alpha' (1 - e^-h) D_bar``, ``D_bar = D + (h / h_last) / 2 (D - D_last)``, ``h = ln(sigma / sigma')``.
    First order in the first step and in the one that ends at sigma = 0.
    """
    return dpmpp_2m_sde(step, x, memory, 0.0)


@register("dpmpp_2m_sde", order=2, offers=("direction",), eta=1.0)
def dpmpp_2m_sde(step: Step, x: Tensor, memory: Last | None, eta: float) -> tuple[Tensor, Last]:
    """DPM-Solver++(2M) of the reverse diffusion, midpoint form (Lu et al. 2022b), with eta times its noise.

    ``x' = (s'/s) e^(-eta h) x + alpha' (1 - e^(-(1 + eta) h)) D_bar + s' sqrt(1 - e^(-2 eta h)) z``. eta = 0 is the ODE solver;
    the order is that of the ODE. A direction takes the place of D in n_hat and D_last, as in CFG++ (Chung et al. 2024):
    ``x' = alpha' (D + (1 - e^(-(1 + eta) h)) (D_bar - D)) + s' e^(-eta h) n_hat``, and the noise.
    """
    here, there = step.here, step.there
    result = step.denoise(x)
    denoised = result.denoised
    shrink = there.sigma / here.sigma
    h = -math.log(shrink) if shrink > 0 else math.inf
    target = denoised
    if memory is not None and there.sigma > 0 and memory.h < math.inf:
        target = torch.lerp(memory.denoised, denoised, 1 + h / (2 * memory.h))
    kept = shrink**eta
    if result.direction is None:
        out = torch.add(there.s / here.s * kept * x, target, alpha=there.alpha * (1 - shrink * kept))
    else:
        out = there.alpha * denoised.lerp(target, 1 - shrink * kept) + there.s * kept * direction(x, result, here)
    if eta > 0 and there.sigma > 0:
        out = out + (there.s * math.sqrt(1 - kept * kept)) * step.draw(x)
    return out, Last(denoised if result.direction is None else result.direction, h)
