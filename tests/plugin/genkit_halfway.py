"""Halfway guidance: CFG whose pull fades with every step. An example of a plug-in."""

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance import COND, UNCOND, Branch, Guidance, Result, StepInfo
from genkit.guidance.base import Predictions, check_number


@dataclass(frozen=True)
class Halfway(Guidance):
    """``D = D_c + (w - 1) 2^(-step / half_life) (D_c - D_u)``."""

    scale: float
    half_life: float = 3.0
    examples: ClassVar[tuple[str, ...]] = ("Halfway(4.0)", "Halfway(4.0, half_life=1.0)")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        check_number(self, "half_life", 0.0, 1e6, inside=True)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, UNCOND)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        if w == 1:
            return Result(cond), state
        pull = (w - 1) * 2 ** (-info.index / self.half_life)
        return Result(cond + pull * (cond - predictions["uncond"])), state
