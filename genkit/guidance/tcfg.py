"""Tangential damping of the unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit import noise
from genkit.guidance.apg import project
from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond


def damped(cond: Tensor, uncond: Tensor) -> Tensor:
    """``uncond`` projected on the leading right-singular vector of the two rows [cond; uncond], per sample, in float64.

    With (cos t, sin t) the leading eigenvector of their 2 x 2 Gram matrix, that vector is along ``cos t c + sin t u``, and the
    projection is ``sin t (cos t c + sin t u)``; ``tan 2t = 2 <c, u> / (<c, c> - <u, u>)``.
    """
    c, u = cond.double().flatten(1), uncond.double().flatten(1)
    cc, cu, uu = (c * c).sum(1, keepdim=True), (c * u).sum(1, keepdim=True), (u * u).sum(1, keepdim=True)
    angle = torch.atan2(2 * cu, cc - uu) / 2
    return (angle.sin() * (angle.cos() * c + angle.sin() * u)).reshape(uncond.shape).to(uncond)


@dataclass(frozen=True)
class TCFG(CondUncond):
    """``eps_c + (w - 1)(eps_c - eps_u')``, eps_u' being eps_u without its small component (TCFG, Kwon et al. 2025).

    ``eps_u' = <eps_u, v> v``, v the leading right-singular vector of ``[eps_c; eps_u]``, per sample over all axes.
    At pure noise (alpha = 0), where every eps is x / s, the limit alpha -> 0 is taken: half of the part of ``D_c - D_u`` that is
    orthogonal to x goes.

    Args:
        scale: w, 1 means no guidance.

    Raises:
        ValueError: scale is not a finite number.
    """

    scale: float
    space: ClassVar[noise.Space] = "eps"
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("TCFG(4.0)",)

    def __post_init__(self) -> None:
        check_number(self, "scale")

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        if w != 1 and info.alpha == 0 and self.space == "eps":
            parallel, orthogonal = project(cond - predictions["uncond"], info.x)
            return Result(cond + (w - 1) * (parallel + orthogonal / 2)), state
        return super().combine(info, predictions, state)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        cond = predictions["cond"]
        return Result(cond + (self.weight(info) - 1) * (cond - damped(cond, predictions["uncond"]))), state
