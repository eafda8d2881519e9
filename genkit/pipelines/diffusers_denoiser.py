"""The network of a diffusers pipeline as a denoiser."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import noise
from genkit.guidance.base import Perturbation
from genkit.noise import FLOW
from genkit.pipelines.attach.course import Course
from genkit.pipelines.attach.perturb import weaken


class DiffusersDenoiser:
    """``D(x; sigma)`` of a network that predicts eps, v, flow or x0 at the timesteps of a diffusers scheduler.

    A noise level that the scheduler visits has the scheduler's own timestep; between them it is interpolated in ln(sigma) over
    the table of training levels (for a flow, ``t = sigma / (1 + sigma)`` of the training steps). The network runs in its own
    dtype, everything else in that of ``x``. A condition holds the network's other arguments by name.

    Args:
        network: of diffusers, called with the image, ``timestep`` and the condition.
        course: of a scheduler after ``set_timesteps``.
        shape: of the images (..., height, width), by which perturbations of the network find a token's place.

    Attributes:
        path: ``vp`` for tables of alphas_cumprod, ``flow`` for flow matching.
    """

    def __init__(self, network: Any, course: Course, shape: tuple[int, ...]) -> None:
        self.network, self.course, self.shape, self.path = network, course, shape, course.path
        self.known = {at.level: t for at, t in zip(course.places, course.timesteps[course.first :], strict=False)}

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level."""
        near = min(self.known, key=lambda level: abs(_angle(level) - _angle(sigma)))
        if math.isclose(_angle(near), _angle(sigma), rel_tol=1e-6):
            return self.known[near]
        if self.path is FLOW:
            return float(self.course.scheduler.config.num_train_timesteps * FLOW(sigma)[1])
        wanted = math.log(max(sigma, 1e-12))  # at inf the end of the table
        return float(np.interp(wanted, self._trained, np.arange(len(self._trained))))

    @cached_property
    def _trained(self) -> np.ndarray:
        """ln(sigma) of each training timestep; the last may stand for pure noise."""
        abar = self.course.scheduler.alphas_cumprod.double().clamp(1e-12, 1 - 1e-12).cpu().numpy()
        found: np.ndarray = np.log((1 - abar) / abar) / 2
        return found

    def __call__(self, x: Tensor, sigma: Tensor, condition: dict[str, Any], /) -> Tensor:
        values = sigma.tolist()
        times = {value: self.timestep(value) for value in set(values)}
        t = torch.tensor([times[value] for value in values], dtype=torch.float32, device=x.device)
        raw = self.network(x.to(self.network.dtype), timestep=t, **condition, return_dict=False)[0]
        raw = raw[:, : x.shape[1]].to(x.dtype)  # without the channels of a learned variance
        if len(times) == 1:
            return noise.to_x0(raw, x, *self.path(values[0]), self.course.space)
        rows = [noise.to_x0(r, one, *self.path(value), self.course.space) for r, one, value in zip(raw, x, values, strict=True)]
        return torch.stack(rows)

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[Any]:
        """Inside the returned context the network is weakened. Raises ValueError if it cannot be, or lacks the layers."""
        return weaken(self.network, perturbation, self.shape)


def _angle(sigma: float) -> float:
    """Noise levels on a scale on which all of them differ, inf too."""
    return math.atan(sigma)
