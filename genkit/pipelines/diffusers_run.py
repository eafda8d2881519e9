"""What a run of a diffusers model needs beside the model: random numbers, and a way from noise to image."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit.noise import FLOW, GRIDS, VE, VP, Path
from genkit.random import Gaussian, check_seeds
from genkit.samplers.diffusion.bridge import Bridge, from_diffusers
from genkit.samplers.diffusion.loop import Sampler, find_sampler, points
from genkit.samplers.diffusion.scheduler_levels import state_of


class Draw:
    """The random numbers of a call: of the caller's generators, in diffusers' order, or one generator per seed.

    Args:
        shape: of the latents.
        dtype: in which diffusers draws its first noise.
        generator, seeds: one of them, with one entry per image or, for a generator, one for all. Neither is seeds 0, 1, ...

    Raises:
        ValueError: both are given, or a wrong number of them.
    """

    def __init__(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: Any, seeds: Sequence[int] | None
    ) -> None:
        if generator is not None and seeds is not None:
            raise ValueError("generator and seeds are both given: give one of them")
        self.shape, self.device, self.dtype = shape, device, dtype
        self.seeds = check_seeds(range(shape[0]) if seeds is None else seeds) if generator is None else None
        if self.seeds is not None:
            self.generators = Gaussian(self.seeds, stream=1).generators
        else:
            self.generators = generator if isinstance(generator, list) else [generator]
        if len(self.generators) != shape[0] and (self.seeds is not None or isinstance(generator, list)):
            name = "generator" if self.seeds is None else "seeds"
            raise ValueError(f"{name} has {len(self.generators)} entries for {shape[0]} images: give one per image")

    def first(self) -> Tensor:
        """Unit noise to start from."""
        if self.seeds is not None:
            return Gaussian(self.seeds)(torch.empty(self.shape, device=self.device))
        found: Tensor = randn_tensor(self.shape, generator=self.generators, device=self.device, dtype=self.dtype)
        return found

    def __call__(self, like: Tensor, step: int = 0) -> Tensor:
        """Unit noise for a solver on its way."""
        found: Tensor = randn_tensor(like.shape, generator=self.generators, device=like.device, dtype=like.dtype)
        return found


def prepared(pipe: Any, network: Any, steps: int, shape: tuple[int, ...]) -> Any:
    """A copy of the pipeline's scheduler that is set to ``steps`` steps for latents of this shape.

    Raises:
        ValueError: steps is not an integer from 1 on, or the scheduler is of a kind genkit cannot read.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps={steps!r} must be an integer from 1 on")
    scheduler, options = copy.deepcopy(pipe.scheduler), {}
    state_of(scheduler)
    config = scheduler.config
    if config.get("use_dynamic_shifting"):  # the flow's time depends on the number of tokens
        tokens = (shape[2] // network.config.patch_size) * (shape[3] // network.config.patch_size)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
        options["mu"] = low + (high - low) * (tokens - few) / (many - few)
    scheduler.set_timesteps(steps, device=pipe._execution_device, **options)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


class Way(NamedTuple):
    """From noise to image: a solver with its noise levels (N + 1,) and coordinates, and a factor for the noise it begins with."""

    solver: Sampler
    sigmas: Tensor
    path: Path
    size: float
    home: Path  # where the scheduler keeps its state


def way_of(sampler: str | Sampler, grid: Any, scheduler: Any) -> Way:
    """The scheduler itself (``"bridge"``), or a sampler of genkit on the scheduler's noise levels or others.

    A sampler that can be used on any path is run on ``ve`` where all levels are finite, as diffusers' solvers of its name are.

    Args:
        sampler: name, expression or object.
        grid: None for the levels of the scheduler, the name of a grid over the range of the training, or falling levels.
        scheduler: after ``set_timesteps``.

    Raises:
        ValueError: an unknown sampler or grid, levels that do not fall, or a grid for the bridge.
    """
    bridge = from_diffusers(scheduler)
    if isinstance(sampler, str) and sampler.strip() == "bridge":
        if grid is not None:
            raise ValueError(f"grid={grid!r} needs a sampler of genkit; the bridge keeps to the pipeline's scheduler")
        return Way(bridge.sampler, bridge.sigmas, bridge.path, bridge.scale, bridge.path)
    try:
        solver = find_sampler(sampler)
    except ValueError as error:
        raise ValueError(f"{error}; or 'bridge', the pipeline's own scheduler") from None
    sigmas = bridge.sigmas if grid is None else _levels(grid, scheduler, bridge)
    first = float(sigmas[0])
    path = solver.path or (FLOW if bridge.path is FLOW else VP if math.isinf(first) else VE)
    points(sigmas, path)
    # On its own levels the first state is as large as the scheduler makes it.
    size = path(first)[1] * (bridge.scale / bridge.path(first)[1] if grid is None else 1.0)
    return Way(solver, sigmas, path, size, bridge.path)


def _levels(grid: Any, scheduler: Any, bridge: Bridge) -> Tensor:
    if not isinstance(grid, str):
        try:
            return torch.as_tensor(grid, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"grid={grid!r} must be falling noise levels, or one of {', '.join(GRIDS)} ({error})") from None
    if grid not in GRIDS:
        raise ValueError(f"grid={grid!r} is unknown; use one of {', '.join(GRIDS)}, or falling noise levels")
    if bridge.path is FLOW:
        low, high = min(sigma for sigma in bridge.sigmas.tolist() if sigma > 0), math.inf
    else:
        low, high = (math.sqrt(1 / a - 1) if a else math.inf for a in scheduler.alphas_cumprod[[0, -1]].tolist())
    try:
        return GRIDS[grid](len(bridge.sigmas) - 1, low, high)
    except ValueError as error:
        raise ValueError(f"grid={grid!r} does not fit this model ({error}); use 'uniform_t', or levels of your own") from None
