"""Adaptive projected guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.measures import norm, per_sample


def project(delta: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``delta`` (B, ...) into the parts parallel and orthogonal to ``onto``, per sample, computed in float64."""
    d, axis = delta.double().flatten(1), onto.double().flatten(1)
    axis = torch.nn.functional.normalize(axis, dim=1)  # a zero vector stays zero: all of delta is then orthogonal
    parallel = (d * axis).sum(1, keepdim=True) * axis
    return parallel.reshape(delta.shape).to(delta), (d - parallel).reshape(delta.shape).to(delta)


@dataclass(frozen=True)
class APG(CondUncond):
    """``D = D_c + (w - 1)(d_perp + eta d_par)``, ``d`` the clamped running average of ``D_c - D_u`` (Sadat et al. 2024, alg. 1).

    Momentum ``d <- (D_c - D_u) + momentum d``, then ``d min(1, threshold / |d|)``, then the split along ``D_c``; norms and
    projections per sample over all axes, in x0 space. The average moves only in evaluations that are guided.

    Args:
        scale: w, 1 means no guidance.
        eta: share of the parallel part kept; 0 removes it (the paper's choice), 1 is CFG.
        momentum: beta, from -1 to 1 exclusive; negative pushes away from past updates. 0 turns it off.
        threshold: r, the largest norm of d, in units of the image norm (all values of one sample); 0 or inf turns it off.

    Raises:
        ValueError: an argument outside its range.
    """

    scale: float
    eta: float = 0.0
    momentum: float = 0.0
    threshold: float = 0.0
    affine: ClassVar[bool] = False
    logits: ClassVar[bool | None] = True
    examples: ClassVar[tuple[str, ...]] = ("APG(4.0)", "APG(4.0, eta=0.5, momentum=-0.5, threshold=5.0)")

    def __post_init__(self) -> None:
        for name in ("scale", "eta"):
            check_number(self, name)
        check_number(self, "momentum", -1.0, 1.0, inside=True)
        check_number(self, "threshold", 0.0, math.inf)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        delta = cond - predictions["uncond"]
        if self.momentum:
            delta = delta if state is None else delta + self.momentum * state
            state = delta
        if 0 < self.threshold < math.inf:
            size = norm(delta)
            factor = (self.threshold / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
            delta = (delta * per_sample(factor, delta)).to(delta)
        if self.eta != 1:
            parallel, orthogonal = project(delta, cond)
            delta = torch.add(orthogonal, parallel, alpha=self.eta) if self.eta else orthogonal
        return Result(torch.add(cond, delta, alpha=w - 1)), state
