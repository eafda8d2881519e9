"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from genkit.guidance.base import COND, Branch, Host, Predictions, Result, StepInfo, _Combinator, check_number
from genkit.guidance.levels import noise_level


@dataclass(frozen=True)
class Interval(_Combinator):
    """``inner`` where ``low < sigma <= high``, the conditional prediction elsewhere (Kynkaanniemi et al. 2024, eq. 5).

    Outside the interval the other branches are not evaluated. The gate is set once a step, by the noise level at which it
    begins, and holds for its second evaluation too, as in the authors' sampler.

    Args:
        inner: any guidance.
        low, high: bounds in ``unit``. low = high is the empty interval (but one step for ``unit="step"``).
        unit: ``"sigma"``: EDM noise level, low < sigma <= high, from 0 to inf. ``"step"``: step indices from 0, both included.
            ``"fraction"``: of the steps, int(low N) <= i < int(high N), from 0 to 1.

    Raises:
        ValueError: low > high, a bound outside its range, or an unknown unit.
    """

    low: float
    high: float
    unit: Literal["sigma", "step", "fraction"] = "sigma"
    examples: ClassVar[tuple[str, ...]] = (
        "Interval(CFG(3.0), 0.28, 5.42)",
        "Interval(APG(4.0, momentum=-0.5), 2, 5, 'step')",
        "Interval(CFG(2.0), 0.2, 0.8, unit='fraction')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("sigma", "step", "fraction"):
            raise ValueError(f"Interval: unit={self.unit!r} must be 'sigma', 'step' or 'fraction'")
        for name in ("low", "high"):
            check_number(self, name, 0.0, 1.0 if self.unit == "fraction" else math.inf)
        if self.low > self.high:
            raise ValueError(
                f"Interval: low={self.low:g} is above high={self.high:g}; give the lower bound first: "
                f"Interval(inner, {self.high:g}, {self.low:g})"
            )

    def active(self, info: StepInfo) -> bool:
        """Whether the step is inside."""
        if self.unit == "sigma":
            return self.low < noise_level(info, "Interval: unit='sigma'", "unit='step' or unit='fraction'") <= self.high
        if self.unit == "step":
            return self.low <= info.index <= self.high
        return int(self.low * info.total) <= info.index < int(self.high * info.total)

    def weight(self, info: StepInfo) -> float:
        return self.inner.weight(info) if self.active(info) else 1.0

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return self.inner.prepare(info, run, state) if self.active(info) else state

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.inner.plan(info, state) if self.active(info) else (COND,)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        if self.active(info):
            return self.inner.combine(info, predictions, state)
        return Result(predictions["cond"]), state

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        return self.inner.refine(info, result, run, state) if self.active(info) else (result, state)
