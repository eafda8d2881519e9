"""No guidance: the conditional prediction as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.base import COND, Branch, Guidance, Predictions, Result, StepInfo


@dataclass(frozen=True)
class NoGuidance(Guidance):
    """``D = D_c``: one evaluation a step."""

    examples: ClassVar[tuple[str, ...]] = ("NoGuidance()",)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return Result(predictions["cond"]), state
