"""What methods that work on the conditional and the unconditional prediction have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Predictions, Result, StepInfo


@dataclass(frozen=True)
class CondUncond(Guidance, abstract=True):
    """A guidance by ``predictions["cond"]`` and ``predictions["uncond"]``: a subclass adds ``scale`` and ``rule``.

    At w = 1 the unconditional branch is not evaluated, the result is the conditional prediction, ``rule`` is not called and the
    state stays.
    """

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, UNCOND)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        if self.weight(info) == 1:  # to another space and back would round
            return Result(predictions["cond"]), state
        return super().combine(info, predictions, state)
