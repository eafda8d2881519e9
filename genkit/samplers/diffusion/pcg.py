"""Predictor-corrector guidance."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from genkit.samplers.diffusion.euler import euler
from genkit.samplers.diffusion.loop import Step, direction, register


@register("pcg", order=1, offers=("direction", "corrector"), corrections=1)
def pcg(step: Step, x: Tensor, memory: Any, corrections: int) -> tuple[Tensor, Any]:
    """DDIM, then ``corrections`` Langevin steps at the new level: 1 + K evaluations (Bradley & Nakkiran 2024).

    A Langevin step is solved exactly for a constant estimate, ``x <- alpha' D + s' (r n_hat + sqrt(1 - r^2) z)`` with
    ``r = sigma' / sigma``: to first order the paper's ``x + delta / 2 score + sqrt(delta) z``, ``delta = sigma^2 - sigma'^2`` on
    the ve path, but stable for steps of any size. One correction with the estimate of the DDIM step turns that into a DDPM step.
    There is none where the step ends at sigma = 0.

    A tool for understanding: with :class:`genkit.guidance.predictor_corrector.PredictorCorrector` around CFG(2 w - 1) it tends
    to what CFG(w) does on a DDPM sampler. Its authors recommend it for nothing else.
    """
    x, _ = euler(step, x, None)
    there = step.there
    if there.s == 0:
        return x, None
    ratio = there.sigma / step.here.sigma
    for _ in range(int(corrections)):
        result = step.denoise(x, there, "corrector")
        fresh = step.draw(x)
        x = there.alpha * result.denoised + there.s * (ratio * direction(x, result, there) + math.sqrt(1 - ratio**2) * fresh)
    return x, None
