"""Sliding-mode control of classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.measures import working


@dataclass(frozen=True)
class SMC(CondUncond):
    """``D = D_c + (w - 1)(e - k S / |S|)``, ``S = (e - e') + lambda e'`` (SMC-CFG, arXiv 2603.03281, in its normalised form).

    ``e = D_c - D_u``, e' that of the last guided evaluation (e itself at the first); norms per sample over all axes, in x0 space.
    The form written elsewhere, ``D_u + w (e - k S / |S|)``, is not the conditional prediction at w = 1.

    Args:
        scale: w, 1 means no guidance.
        k: length of the correction, in units of the image norm (all values of one sample), from 0 (CFG) on.
        slope: lambda, from 0 on; 6 is the default of the public node.

    Raises:
        ValueError: an argument outside its range.
    """

    scale: float
    k: float = 0.1
    slope: float = 6.0
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("SMC(4.0)", "SMC(3.0, k=0.5, slope=2.0)")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        for name in ("k", "slope"):
            check_number(self, name, 0.0, 1e6)

    def rule(self, info: StepInfo, predictions: Predictions, state: Tensor | None) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        error = cond - predictions["uncond"]
        before = error if state is None else state
        surface = (error - before) + self.slope * before
        unit = torch.nn.functional.normalize(working(surface).flatten(1), dim=1).reshape(surface.shape)  # 0 stays 0
        return Result((cond + (w - 1) * (error - self.k * unit)).to(cond)), error
