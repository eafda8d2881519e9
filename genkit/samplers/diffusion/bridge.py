"""Schedulers of diffusers as samplers of the shared loop."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.noise import FLOW, VE, VP, Path, from_x0
from genkit.samplers.diffusion.loop import Point, Sampler, Step
from genkit.samplers.diffusion.scheduler_levels import State, is_a, levels, prediction_space, state_of

PATHS: dict[State, Path] = {"discrete": VP, "vp": VP, "ve": VE, "flow": FLOW}


class Bridge(NamedTuple):
    """A scheduler's run: ``sample(guided, bridge.start(noise), bridge.sigmas, bridge.sampler, bridge.path, source)``."""

    sampler: Sampler
    sigmas: Tensor
    path: Path
    scale: float

    def start(self, noise: Tensor) -> Tensor:
        """The first state as the scheduler's pipelines make it: ``init_noise_sigma n``."""
        return self.scale * noise


class Memory(NamedTuple):
    """What a run owns: its copy of the scheduler, and how often it was called."""

    scheduler: Any
    calls: int


class Unavailable:
    """Stands for a generator that cannot be had, so that a scheduler that asks for one does not fall back to the global one."""

    def __init__(self, message: str) -> None:
        self.message = message

    @property
    def device(self) -> torch.device:
        raise ValueError(self.message)


def from_diffusers(scheduler: Any, steps: int | None = None, **options: Any) -> Bridge:
    """A diffusers scheduler as a sampler, on its own noise levels; guidance, trace and noise per sample are those of the loop.

    The estimate is converted to what the scheduler expects of a network (epsilon, v, sample, flow). Runs do not share state: each
    works on a copy. Two-call schedulers (Heun, PNDM) make their second call with stage "second" of the same step.

    Args:
        scheduler: not changed. See :mod:`genkit.samplers.diffusion.scheduler_levels` for those that are known.
        steps: number of steps; None keeps those that ``scheduler.set_timesteps`` has made.
        options: of ``scheduler.step``, for example ``eta=0.5`` of DDIM.

    Raises:
        ValueError: a scheduler whose x0 cannot be had exactly, that wants other calls than the loop makes, or without timesteps.
        TypeError: an option that its ``step`` does not have.
    """
    state = state_of(scheduler)
    name = type(scheduler).__name__
    if is_a(scheduler, "CogVideoXDPM"):
        raise ValueError(
            f"scheduler={name} cannot be used: its step also wants the estimate before; use DPMSolverMultistepScheduler"
        )
    if is_a(scheduler, "PNDM") and not scheduler.config.skip_prk_steps:
        raise ValueError(f"scheduler={name} with skip_prk_steps=False needs four calls in a step; set skip_prk_steps=True")
    unknown = set(options) - set(inspect.signature(scheduler.step).parameters)
    if unknown:
        raise TypeError(f"{name}.step has no option {', '.join(sorted(unknown))!r}")
    own = copy.deepcopy(scheduler)
    if steps is not None:
        own.set_timesteps(steps)
    elif own.num_inference_steps is None:
        raise ValueError(f"scheduler={name} has no timesteps: give steps, or call its set_timesteps before")
    elif getattr(own, "step_index", None) is not None:
        raise ValueError(f"scheduler={name} is in the middle of a run: give steps, or call its set_timesteps again")
    solver = Sampler(name, _stepper(own, options), getattr(own, "order", 1), path=PATHS[state], doc=f"{name} of diffusers")
    return Bridge(solver, _sigmas(own), PATHS[state], float(getattr(own, "init_noise_sigma", 1.0)))


def _groups(scheduler: Any) -> list[int]:
    """How many calls each step has."""
    count = len(scheduler.timesteps)
    if getattr(scheduler, "order", 1) == 2:
        return [2] * (count // 2) + [1] * (count % 2)
    if is_a(scheduler, "PNDM") and count > 1:
        return [2] + [1] * (count - 2)
    return [1] * count


def _sigmas(scheduler: Any) -> Tensor:
    """(N + 1,) the level at which each step begins, and the last one."""
    at, found = copy.copy(scheduler), []
    for i in itertools.accumulate([0, *_groups(scheduler)[:-1]]):
        at._step_index = i  # levels() trusts the count, for timesteps may be repeated or rounded
        found.append(_sigma(*levels(at, scheduler.timesteps[i])))
    if state_of(scheduler) != "discrete":
        last = float(scheduler.sigmas[-1])
        end = _sigma(1 - last, last) if state_of(scheduler) == "flow" else last
    else:
        abar = 1.0 if is_a(scheduler, "DDPM", "DDPMParallel", "LCM") else float(scheduler.final_alpha_cumprod)
        end = math.sqrt(1 / abar - 1)
    return torch.tensor([*found, end if end < found[-1] else 0.0], dtype=torch.float64)


def _sigma(alpha: float, s: float) -> float:
    return s / alpha if alpha > 0 else math.inf


def _stepper(fresh: Any, options: dict[str, Any]) -> Any:
    """The step function: one or two calls of the run's own copy of the scheduler."""
    groups, grid = _groups(fresh), _sigmas(fresh).tolist()
    state, space = state_of(fresh), prediction_space(fresh)
    takes = inspect.signature(fresh.step).parameters

    def step_function(step: Step, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        i = step.index
        if step.total != len(groups) or step.here.sigma != grid[i]:
            raise ValueError(f"sigmas do not belong to this {type(fresh).__name__}: sample on the sigmas of its bridge")
        scheduler, calls = memory or Memory(copy.deepcopy(fresh), 0)
        for k in range(groups[i]):
            t = scheduler.timesteps[calls + k]
            alpha, s = levels(scheduler, t)
            at = Point(_sigma(alpha, s), *((1.0, s / alpha) if state == "ve" else (alpha, s)))
            denoised = step.denoise(x, at, "second" if k else "step").denoised
            output = from_x0(denoised, scheduler.scale_model_input(x, t) if state == "ve" else x, alpha, s, space)
            x = scheduler.step(output, t, x, **options, **_noise(step, x, takes)).prev_sample.to(x)
        return x, Memory(scheduler, calls + groups[i])

    return step_function


def _noise(step: Step, x: Tensor, takes: Any) -> dict[str, Any]:
    """The run's noise in a form the scheduler takes: the generators of its samples, of which it draws when it needs to."""
    if "generator" not in takes:
        return {}
    generators = getattr(step.noise, "generators", None)
    if generators is not None:
        return {"generator": list(generators)}
    if step.noise is not None and "variance_noise" in takes:
        return {"variance_noise": step.draw(x)}
    given = "None" if step.noise is None else type(step.noise).__name__
    advice = "this scheduler draws noise by itself: give a source such as genkit.random.Gaussian(seeds, stream=1)"
    return {"generator": Unavailable(f"noise={given}, but {advice}")}


__all__ = ["Bridge", "from_diffusers"]
