"""Second-order Heun, with EDM's churn."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from genkit.noise import FLOW
from genkit.samplers.diffusion.euler import euler
from genkit.samplers.diffusion.loop import Point, Step, direction, register


@register(
    "flow_heun",
    order=2,
    offers=("direction",),
    grid="uniform_t",
    path=FLOW,
    churn=0.0,
    churn_min=0.0,
    churn_max=math.inf,
    churn_noise=1.0,
)
@register("heun", order=2, offers=("direction",), grid="edm", churn=0.0, churn_min=0.0, churn_max=math.inf, churn_noise=1.0)
def heun(
    step: Step, x: Tensor, memory: Any, churn: float, churn_min: float, churn_max: float, churn_noise: float
) -> tuple[Tensor, Any]:
    """Heun's method (Karras et al. 2022, alg. 2): two evaluations a step, one in the last.

    The flow is ``dx = D dalpha + n_hat ds`` on any path; the step averages D and n_hat of both ends. On the ve path it is
    EDM's, on the flow path Heun in t. ``churn`` is S_churn: the level is first raised by a factor 1 + min(churn / N, sqrt 2 - 1)
    where churn_min <= sigma <= churn_max, with fresh noise scaled by churn_noise.
    """
    here, there = step.here, step.there
    churned = churn_min <= here.sigma <= churn_max and here.sigma < math.inf  # pure noise cannot be made noisier
    gamma = min(churn / step.total, math.sqrt(2) - 1) if churned else 0.0
    if gamma > 0:
        sigma = here.sigma * (1 + gamma)
        hat = Point(sigma, *step.path(sigma))
        x = (hat.alpha / here.alpha) * x + (hat.alpha * math.sqrt(sigma**2 - here.sigma**2) * churn_noise) * step.draw(x)
        here = step.here = hat._replace(sigma=here.sigma)  # gates look at the level where the step began
    if there.s == 0:
        return euler(step, x, None)
    first = step.denoise(x, here)
    n_first = direction(x, first, here)
    d_alpha, d_s = there.alpha - here.alpha, there.s - here.s
    probe = x + d_s * n_first if d_alpha == 0 else x + d_alpha * first.denoised + d_s * n_first
    second = step.denoise(probe, there, "second")
    n_second = direction(probe, second, there)
    out = x + (d_s / 2) * (n_first + n_second)
    return (out if d_alpha == 0 else out + (d_alpha / 2) * (first.denoised + second.denoised)), None
