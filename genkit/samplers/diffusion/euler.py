"""First-order samplers: Euler, DDIM, Euler ancestral. In these coordinates they are one step with more or less fresh noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genkit.noise import FLOW
from genkit.samplers.diffusion.loop import Step, direction, register


@register("flow_euler", order=1, offers=("direction",), grid="uniform_t", path=FLOW)
@register("euler", order=1, offers=("direction",))
def euler(step: Step, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
    """Euler: ``x' = alpha' D + s' n_hat``.

    Exact for constant D and n_hat, so the step is the same on every path (Karras et al. 2022, alg. 1 without correction;
    Song et al. 2021 with eta = 0; on the flow path, Euler in t).
    """
    result = step.denoise(x)
    here, there = step.here, step.there
    if result.direction is None:
        ratio = there.s / here.s  # alpha' D + s' (x - alpha D) / s, regrouped: two operations, on the ve path one
        if here.alpha == there.alpha == 1:
            return torch.lerp(result.denoised, x, ratio), None
        return torch.add(ratio * x, result.denoised, alpha=there.alpha - ratio * here.alpha), None
    return there.alpha * result.denoised + there.s * direction(x, result, here), None


def split(step: Step, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the noise the next state keeps, and the fresh noise it gets."""
    here, there = step.here, step.there
    # Above sigma' the state would be noisier than its level says; eta large enough makes all of its noise fresh.
    up = min(there.sigma, eta * there.sigma * math.sqrt(max(0.0, 1 - (there.sigma / here.sigma) ** 2)))
    return math.sqrt(max(0.0, there.sigma**2 - up**2)), up


def ancestral(step: Step, x: Tensor, eta: float) -> Tensor:
    """``x' = alpha' (D + sigma_down n_hat + sigma_up z)`` with ``sigma_down^2 = sigma'^2 - sigma_up^2``.

    ``sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)``.

    At eta = 1 the ancestral (DDPM posterior) step. No noise is drawn where sigma_up is 0.
    """
    here, there, (down, up) = step.here, step.there, split(step, eta)
    if up == 0:
        return euler(step, x, None)[0]
    result = step.denoise(x)
    out = there.alpha * result.denoised + (there.alpha * down) * direction(x, result, here)
    return out + (there.alpha * up) * step.draw(x)


@register("ddim", order=1, offers=("direction",), eta=0.0)
def ddim(step: Step, x: Tensor, memory: Any, eta: float) -> tuple[Tensor, Any]:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta = 0 is deterministic and equal to Euler, eta = 1 is DDPM."""
    return (ancestral(step, x, eta) if eta else euler(step, x, None)[0]), None


@register("euler_ancestral", order=1, offers=("direction",), eta=1.0)
def euler_ancestral(step: Step, x: Tensor, memory: Any, eta: float) -> tuple[Tensor, Any]:
    """Euler with ancestral noise: DDIM whose default eta is 1."""
    return ancestral(step, x, eta), None
