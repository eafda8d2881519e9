"""Condition-annealed sampling."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genkit.guidance.base import Branch, Host, Need, StepInfo, Transform, _Combinator, check_number
from genkit.guidance.conditions import drawn, is_embedding, replaced
from genkit.guidance.levels import noise_level
from genkit.guidance.measures import moments, working


@dataclass(frozen=True)
class CADS(_Combinator):
    """``inner`` with a noised condition early in the run, for more varied images (Sadat et al. 2023).

    ``y' = sqrt(g) y + s sqrt(1 - g) n`` becomes y'' with mean and std of y; the model sees ``psi y'' + (1 - psi) y'``.
    g is 0 for times t >= tau2, 1 for t <= tau1, linear between. t falls from 1 (noise) to 0 (image). Statistics are over all
    values of one sample, noise is new in every step, and all branches that have the condition see the same y'.

    Class labels are noised as embeddings. In a mapping the embeddings are known by their names (text_embeds,
    encoder_hidden_states, ...); masks, ids, sizes and control images stay.

    Inactive where the scale in force is 1: scale 1 stays the plain conditional prediction. The defaults of tau1, tau2 and
    noise_scale are a place to start; good values depend on model and embedding.

    Args:
        inner: any guidance.
        tau1, tau2: times at which annealing ends and begins, 0 <= tau1 <= tau2 <= 1.
        noise_scale: s, from 0, in units of the embedding. 0 turns the method off.
        psi: share of the rescaled condition, from 0 to 1. At 0 it keeps the larger spread that the noise gave it.
        time: ``"flow"``: t = sigma / (1 + sigma) of the step, whatever the grid; ``"progress"``: t = 1 - progress of the run.

    Raises:
        ValueError: an argument outside its range; when run: a condition without embedding, or "flow" where steps have
            no noise level.
    """

    tau1: float = 0.6
    tau2: float = 0.9
    noise_scale: float = 0.25
    psi: float = 1.0
    time: Literal["flow", "progress"] = "flow"
    requires: ClassVar[frozenset[Need]] = frozenset({"noise"})
    examples: ClassVar[tuple[str, ...]] = (
        "CADS(CFG(3.0))",
        "CADS(APG(4.0), tau1=0.2, tau2=0.8, noise_scale=0.1, psi=0.5, time='progress')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau1", "tau2", "psi"):
            check_number(self, name, 0.0, 1.0)
        check_number(self, "noise_scale", 0.0, sys.float_info.max)
        if self.tau1 > self.tau2:
            raise ValueError(f"CADS: tau1={self.tau1:g} is above tau2={self.tau2:g}; annealing begins at tau2 and ends at tau1")
        if self.time not in ("flow", "progress"):
            raise ValueError(f"CADS: time={self.time!r} must be 'flow' or 'progress'")

    def kept(self, info: StepInfo) -> float:
        """g, the share of the condition's power that is left."""
        if self.time == "progress":
            t = 1 - info.progress
        else:
            t = 1 - 1 / (1 + noise_level(info, "CADS: time='flow'", "time='progress'"))
        if t <= self.tau1:
            return 1.0
        return 0.0 if t >= self.tau2 else (self.tau2 - t) / (self.tau2 - self.tau1)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        branches, kept = self.inner.plan(info, state), self.kept(info)
        if kept == 1 or self.noise_scale == 0 or self.weight(info) == 1:
            return branches
        return tuple(
            b._replace(transform=_Noised(self, kept, b.model, b.transform)) if b.condition == "cond" else b for b in branches
        )


@dataclass(frozen=True)
class _Noised:
    """The transform of one branch; after that of the method inside, if it has one."""

    owner: CADS
    kept: float
    model: str
    before: Transform | None

    def __call__(self, condition: Any, info: StepInfo, run: Host) -> Any:
        if self.before is not None:
            condition = self.before(condition, info, run)

        def change(value: Tensor, name: str) -> Tensor | None:
            if not is_embedding(value, name):
                return None
            y = working(value)
            return self.mix(y, drawn("CADS", name, y, info, run)).to(value)

        return replaced("CADS", run.embed(condition, self.model), change)

    def mix(self, y: Tensor, noise: Tensor) -> Tensor:
        """The formula."""
        noised = math.sqrt(self.kept) * y + self.owner.noise_scale * math.sqrt(1 - self.kept) * noise
        if self.owner.psi == 0:
            return noised
        (mean, std), (new_mean, new_std) = moments(y), moments(noised)
        rescaled = (noised - new_mean) * (std / new_std.clamp_min(torch.finfo(y.dtype).tiny)) + mean
        return noised.lerp(rescaled, self.owner.psi)
