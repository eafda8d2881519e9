"""Guidance damped where the branches are far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from genkit import noise
from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.measures import norm, per_sample


@dataclass(frozen=True)
class RAAG(CondUncond):
    """``c + (w_eff - 1) d``, ``w_eff = 1 + (w - 1) exp(-alpha |d| / |u|)``, ``d = c - u`` (RAAG, arXiv 2508.03442).

    c and u are velocities (flow space); the ratio is taken per sample over all axes, so a sample never depends on its batch (the
    authors' code takes it over the whole batch). The same rule is known as MAMBO-G. Where u = 0 there is no guidance.

    Args:
        scale: w, the largest weight, 1 means no guidance. The authors' SD 3.5 setting is 18 with alpha 12; MAMBO-G's 10 with 8.
        alpha: damping, from 0 (CFG) on, per unit of |d| / |u|.

    Raises:
        ValueError: an argument outside its range.
    """

    scale: float
    alpha: float = 12.0
    space: ClassVar[noise.Space] = "flow"
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("RAAG(18.0)", "RAAG(5.0, alpha=2.0)")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        check_number(self, "alpha", 0.0, 1e6)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        delta = cond - predictions["uncond"]
        norm_d, norm_u = norm(delta), norm(predictions["uncond"])
        distance = torch.where(norm_u > 0, norm_d / torch.where(norm_u > 0, norm_u, 1), math.inf)
        damping = torch.exp(-self.alpha * distance) if self.alpha else torch.ones_like(distance)
        return Result((cond + (w - 1) * per_sample(damping, cond) * delta).to(cond)), state
