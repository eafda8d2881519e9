"""The network of a diffusers pipeline as a denoiser."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from genkit import noise
from genkit.guidance.base import Perturbation
from genkit.pipelines.attach.perturb import weaken
from genkit.pipelines.course import Course


class DiffusersDenoiser:
    """``D(x; sigma)`` of a network that predicts eps, v, flow or x0 at the timesteps of a diffusers scheduler.

    The timestep of a noise level is :meth:`genkit.pipelines.course.Course.timestep`. The network runs in its own dtype,
    everything else in that of ``x``. A condition holds the network's other arguments by name.

    Args:
        network: of diffusers, called with the image, ``timestep`` and the condition.
        course: of a scheduler after ``set_timesteps``.
        shape: of the images (..., height, width), by which perturbations of the network find a token's place.

    Attributes:
        path: ``vp`` for tables of alphas_cumprod, ``flow`` for flow matching.
    """

    def __init__(self, network: Any, course: Course, shape: tuple[int, ...]) -> None:
        self.network, self.course, self.shape, self.path = network, course, shape, course.path

    def __call__(self, x: Tensor, sigma: Tensor, condition: dict[str, Any], /) -> Tensor:
        values = sigma.tolist()
        times = {value: self.course.timestep(value) for value in set(values)}
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
