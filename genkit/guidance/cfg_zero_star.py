"""CFG with an optimally scaled unconditional velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from genkit import noise
from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.measures import per_sample


@dataclass(frozen=True)
class CFGZeroStar(CondUncond):
    """``v = a v_u + w (v_c - a v_u)``, ``a = <v_c, v_u> / (|v_u|^2 + 1e-8)`` (CFG-Zero*, Fan et al. 2025).

    v is the flow velocity; products per sample over all axes. The authors also hold the first steps still:
    ``ZeroInit(CFGZeroStar(w))``.

    Args:
        scale: w, 1 means no guidance (the unconditional branch is then not evaluated).

    Raises:
        ValueError: scale is not a finite number.
    """

    scale: float
    space: ClassVar[noise.Space] = "flow"
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("CFGZeroStar(4.0)",)

    def __post_init__(self) -> None:
        check_number(self, "scale")

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        cond, uncond = predictions["cond"], predictions["uncond"]
        return Result((optimal_scale(cond, uncond) * uncond).lerp(cond, self.weight(info))), state


def optimal_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """The factor a that brings ``a uncond`` nearest to ``cond``, per sample, computed in float64: (B, 1, ...)."""
    c, u = cond.double().flatten(1), uncond.double().flatten(1)
    a = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
    return per_sample(a.to(cond), cond)
