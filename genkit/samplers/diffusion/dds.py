"""Decomposed diffusion sampling: estimates that agree with a linear measurement."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from genkit.guidance.base import Guidance, Result, StepInfo
from genkit.samplers.diffusion.euler import euler
from genkit.samplers.diffusion.loop import Denoise, Sampler, Step, direction
from genkit.samplers.operators import LinearOperator, conjugate_gradients


class DataConsistency:
    """A run whose estimate is moved towards ``y = A x`` by a few steps of conjugate gradients (Chung et al. 2024).

    Stands between loop and model, after guidance: ``sample(DataConsistency(guided, operator, y), x, sigmas, DDS, path, noise)``.
    Starting at the estimate D it takes ``steps`` of them on ``A'A x = A'y``, or with ``gamma`` on
    ``(I + gamma A'A) x = D + gamma A'y``. The moved estimate is D of the step; the noise it implies remains that of the model
    (``direction``). Clearly useful, and no posterior sampling.

    Args:
        run: what ``sample`` would be given, a :class:`genkit.denoiser.Guided`.
        operator: A and its adjoint. Where it gives complex numbers for real images, their real part is taken.
        y: (B, ...) the measurement of every sample.
        gamma: weight of the measurement against the estimate, above 0; None trusts the measurement (no noise in it).
        steps: iterations, from 0.

    Raises:
        ValueError: gamma or steps out of range; when it is used, y of another batch than the images.
    """

    def __init__(self, run: Denoise, operator: LinearOperator, y: Tensor, gamma: float | None = None, steps: int = 5) -> None:
        if gamma is not None and not gamma > 0:
            raise ValueError(f"gamma={gamma}: use a positive number, or None for a measurement without noise")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps={steps!r} must be an integer from 0 on")
        self.run, self.operator, self.gamma, self.steps = run, operator, gamma, steps
        self.back = operator.AT(y)

    @property
    def guidance(self) -> Guidance | None:
        """That of the run, for the sampler to check."""
        return getattr(self.run, "guidance", None)

    def __call__(self, info: StepInfo) -> Result:
        result = self.run(info).absorbed(info)
        old = result.denoised if result.direction is None else result.direction
        return result._replace(denoised=self.consistent(result.denoised), direction=old)

    def consistent(self, denoised: Tensor) -> Tensor:
        """The estimate after the conjugate gradients."""
        if len(self.back) != len(denoised):
            raise ValueError(f"y has {len(self.back)} rows, but the batch {len(denoised)}: give one measurement per sample")
        back, gamma = _like(self.back, denoised), self.gamma

        def normal(x: Tensor) -> Tensor:
            return _like(self.operator.AT(self.operator.A(x)), x)

        if gamma is None:
            return conjugate_gradients(normal, back, denoised, self.steps)
        return conjugate_gradients(lambda x: x + gamma * normal(x), denoised + gamma * back, denoised, self.steps)


def _like(value: Tensor, x: Tensor) -> Tensor:
    return (value.real if value.is_complex() and not x.is_complex() else value).to(x)


def dds(step: Step, x: Tensor, memory: Any, eta: float) -> tuple[Tensor, Any]:
    """DDIM with a share eta of its noise fresh: ``x' = alpha' D + s' (sqrt(1 - eta^2) n_hat + eta z)`` (Chung et al. 2024).

    As in the published code; the share does not fall with the step, so without a measurement this does not sample the data's law.
    """
    here, there = step.here, step.there
    if eta == 0 or there.s == 0:
        return euler(step, x, None)
    result = step.denoise(x)
    share = min(1.0, eta)
    kept = math.sqrt(1 - share**2)
    n = share * step.draw(x)
    return there.alpha * result.denoised + there.s * (kept * direction(x, result, here) + n if kept else n), None


DDS = Sampler(
    "dds", dds, 1, options={"eta": 0.85}, doc="DDIM with fresh noise, for DataConsistency", offers=frozenset({"direction"})
)
"""The sampler that goes with :class:`DataConsistency`; ``DDS(eta=0)`` is DDIM. Not in the table: alone it is no sampler."""

__all__ = ["DDS", "DataConsistency", "dds"]
