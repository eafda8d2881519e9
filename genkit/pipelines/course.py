"""Where a diffusers scheduler stands in a run: steps, stages, noise levels and timesteps, read from its own tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from genkit.guidance.base import Stage, StepInfo
from genkit.noise import FLOW, VP, Path
from genkit.samplers.diffusion.scheduler_levels import prediction_space, state_of


class Place(NamedTuple):
    """One evaluation of a run."""

    index: int  # type: ignore[assignment]  # hides tuple.index, as in StepInfo
    total: int
    progress: float
    stage: Stage
    sigma: float
    sigma_next: float
    alpha: float
    s: float

    @property
    def level(self) -> float:
        """The noise level at which the network is evaluated."""
        return self.s / self.alpha if self.alpha else math.inf

    def info(self, x: Tensor) -> StepInfo:
        return StepInfo(*self, x)


class Course:
    """The evaluations of one run: what a scheduler's own counters and tables say, never a count of calls.

    Args:
        scheduler: of diffusers, after ``set_timesteps``, before its first step.
        clock: (a, b): the network is told ``a t + b`` for the scheduler's timestep t.
        time: what the network was told at the first evaluation.
        evaluations: how many there will be, if the pipeline knows; None is up to the end of the scheduler's list.
    """

    def __init__(self, scheduler: Any, clock: tuple[float, float], time: Any, evaluations: int | None) -> None:
        self.scheduler, self.clock = scheduler, clock
        self.space = prediction_space(scheduler)
        self.state = state_of(scheduler)
        self.path: Path = FLOW if self.state == "flow" else VP
        self.timesteps = [float(t) for t in scheduler.timesteps.tolist()]
        self.numbers = {t: i for i, t in reversed(list(enumerate(self.timesteps)))}  # the first of equal ones
        self.table: list[float] = (scheduler.alphas_cumprod if self.state == "discrete" else scheduler.sigmas).tolist()
        self.counts = hasattr(scheduler, "prk_timesteps")  # PNDM, which counts its evaluations and not its list
        self.indexed = hasattr(scheduler, "step_index") and not self.counts
        self.first = self._position(time)
        self.last = self.first - 1
        left = len(self.timesteps) - self.first
        self.places = self._places(min(evaluations or left, left))

    def place(self, time: Any, again: bool = False) -> Place:
        """The evaluation the scheduler waits for; ``time``, what the network is told, is read where it keeps no count.

        Raises ValueError if it is not after the last one, or with ``again`` the last one still.
        """
        position = self.scheduler.step_index if self.indexed else None
        if position is None:  # before its first step, or it keeps no count
            position = self.first + int(self.scheduler.counter) if self.counts else self._position(time)
        if position < self.last or (position == self.last and not again):
            raise ValueError(
                "the network was called twice in one step: a call from outside the pipeline's loop, as by a callback or by a "
                "pipeline around the same network, is not supported inside attach; give it a copy of the network"
            )
        self.last = position
        return self.places[position - self.first]

    def time(self, sigma: float) -> float:
        """What the network is told at a noise level."""
        a, b = self.clock
        return a * self.timestep(sigma) + b

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level.

        A level that the run visits has the scheduler's own. Between them it is interpolated in ln(sigma) over the table of
        training levels, and held at its ends; for a flow it is ``t = sigma / (1 + sigma)`` of the training steps.
        """
        near = min(self._visited, key=lambda level: abs(_angle(level) - _angle(sigma)))
        if math.isclose(_angle(near), _angle(sigma), rel_tol=1e-6):
            return self._visited[near]
        if self.path is FLOW:
            return float(self.scheduler.config.num_train_timesteps * FLOW(sigma)[1])
        return float(np.interp(math.log(max(sigma, 1e-12)), self._trained, np.arange(len(self._trained))))

    @cached_property
    def _visited(self) -> dict[float, float]:
        return {place.level: t for place, t in zip(self.places, self.timesteps[self.first :], strict=False)}

    @cached_property
    def _trained(self) -> np.ndarray:
        """ln(sigma) of each training timestep; the last may stand for pure noise."""
        abar = self.scheduler.alphas_cumprod.double().clamp(1e-12, 1 - 1e-12).cpu().numpy()
        found: np.ndarray = np.log((1 - abar) / abar) / 2
        return found

    def _position(self, time: Any) -> int:
        """Index into ``scheduler.timesteps`` of the evaluation that comes next."""
        if self.indexed:
            known = self.scheduler.step_index
            known = self.scheduler.begin_index if known is None else known
            if known is not None:
                return int(known)
        told = time if not isinstance(time, Tensor) else time.max().item() if time.ndim else time.item()
        timestep = (told - self.clock[1]) / self.clock[0]
        known = self.numbers.get(timestep)
        return known if known is not None else min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))

    def _level(self, i: int) -> tuple[float, float]:
        if self.state == "discrete":
            end = i == len(self.timesteps)
            abar = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0)) if end else self.table[int(self.timesteps[i])]
            return math.sqrt(abar), math.sqrt(1 - abar)
        sigma = self.table[i]
        return (1 - sigma, sigma) if self.state == "flow" else VP(sigma)

    def _stages(self, evaluations: int) -> Iterator[tuple[int, Stage]]:
        """(step, stage) of each evaluation."""
        if self.counts:
            prk = 0 if self.scheduler.config.skip_prk_steps else len(self.scheduler.prk_timesteps)
            for i in range(evaluations):
                if i < prk:  # four evaluations a step
                    yield i // 4, "second" if i % 4 else "step"
                elif prk:
                    yield prk // 4 + i - prk, "step"
                else:  # the first step is corrected once
                    yield max(i - 1, 0), "second" if i == 1 else "step"
            return
        per_step = 2 if hasattr(self.scheduler, "state_in_first_order") else 1
        for i in range(evaluations):
            yield i // per_step, "second" if i % per_step else "step"

    def _places(self, evaluations: int) -> list[Place]:
        known = [self._level(self.first + i) for i in range(evaluations + 1)]
        sigmas = [s / a if a else math.inf for a, s in known]
        stages = list(self._stages(evaluations))
        begin = {step: sigmas[i] for i, (step, stage) in enumerate(stages) if stage == "step"}
        total = len(begin)
        begin[total] = sigmas[-1]
        return [
            Place(step, total, step / (total - 1) if total > 1 else 0.0, stage, begin[step], begin[step + 1], *known[i])
            for i, (step, stage) in enumerate(stages)
        ]


def _angle(sigma: float) -> float:
    """Noise levels on a scale on which all of them differ, inf too."""
    return math.atan(sigma)


__all__ = ["Course", "Place"]
