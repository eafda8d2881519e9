"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Predictions, Result, StepInfo, check_number


@dataclass(frozen=True)
class CFG(Guidance):
    """``D = D_c + (w - 1)(D_c - D_u)`` (Ho & Salimans 2022, eq. 6, whose w is this w - 1).

    Args:
        scale: w. 1 means no guidance, 0 the unconditional prediction: either evaluates its one branch only.

    Raises:
        ValueError: scale is not a finite number.
    """

    scale: float
    examples: ClassVar[tuple[str, ...]] = ("CFG(3.0)", "CFG(0.5)", "CFG(0.0)")

    def __post_init__(self) -> None:
        check_number(self, "scale")

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        w = self.weight(info)
        return (COND,) if w == 1 else (UNCOND,) if w == 0 else (COND, UNCOND)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w = self.weight(info)
        if w == 1:
            return Result(predictions["cond"]), state
        if w == 0:
            return Result(predictions["uncond"]), state
        # lerp is D_u + w (D_c - D_u), the same thing in one operation.
        return Result(predictions["uncond"].lerp(predictions["cond"], w)), state
