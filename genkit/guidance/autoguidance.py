"""Guidance by a worse version of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.base import COND, Branch, Guidance, Predictions, Result, StepInfo, check_number


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """``D = D_weak + w (D_main - D_weak)``, both with the same condition (Karras et al. 2024, eq. 2).

    Args:
        scale: w, 1 means no guidance (the weak model is then not evaluated).
        model: the name of the weak model in the run, a smaller or less trained network for the same data.
        condition: what the weak model is conditioned on. ``"uncond"`` is CFG whose unconditional prediction comes from another
            network (Kynkaanniemi et al. 2024 guide EDM2-XXL by an unconditional XS).

    Raises:
        ValueError: scale is not a finite number, or model or condition is not a name.
    """

    scale: float
    model: str = "weak"
    condition: str = "cond"
    examples: ClassVar[tuple[str, ...]] = ("Autoguidance(2.0)", "Autoguidance(3.0, model='weak', condition='uncond')")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        for name in ("model", "condition"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"Autoguidance: {name}={getattr(self, name)!r} must be a name, for example {name}='weak'")

    @property
    def name(self) -> str:
        """The name of the branch that the weak model evaluates."""
        return "weak" if self.condition == "cond" else self.condition

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, Branch(self.name, self.condition, self.model))

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        return Result(cond if w == 1 else predictions[self.name].lerp(cond, w)), state
