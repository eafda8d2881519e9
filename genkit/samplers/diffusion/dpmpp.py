"""DPM-Solver++(2M)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.samplers.diffusion.loop import Step, register


class Last(NamedTuple):
    """What the multistep formula remembers: the previous estimate and the previous step in lambda = -ln sigma."""

    denoised: Tensor
    h: float


@register("dpmpp_2m", order=2)
def dpmpp_2m(step: Step, x: Tensor, memory: Last | None) -> tuple[Tensor, Last]:
    """Second-order multistep in x0 space, one evaluation a step (Lu et al. 2022b, alg. 2).

    ``x' = (s'/s) x + alpha' (1 - e^-h) D_bar``, ``D_bar = D + (h / h_last) / 2 (D - D_last)``, ``h = ln(sigma / sigma')``.
    First order in the first step and in the one that ends at sigma = 0.
    """
    here, there = step.here, step.there
    denoised = step.denoise(x).denoised
    shrink = there.sigma / here.sigma
    h = -math.log(shrink) if shrink > 0 else math.inf
    target = denoised
    if memory is not None and there.sigma > 0 and memory.h < math.inf:
        target = torch.lerp(memory.denoised, denoised, 1 + h / (2 * memory.h))
    ratio = there.s / here.s
    return torch.add(ratio * x, target, alpha=there.alpha * (1 - shrink)), Last(denoised, h)
