"""CFG that evaluates the unconditional branch only now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from genkit import noise
from genkit.guidance.base import COND, Branch, Predictions, Result, StepInfo, check_count, check_number
from genkit.guidance.cond_uncond import CondUncond


class Kept(NamedTuple):
    delta: Tensor
    step: int  # the one it is from


@dataclass(frozen=True)
class ReuseDelta(CondUncond):
    """``v = v_c + (w - 1) d``, ``d = v_c - v_u`` of the last step that evaluated v_u: every ``every``-th one.

    v is the flow velocity. The steps are counted from the first guided one, so inside an :class:`Interval` the first step is
    evaluated in full. A step with two evaluations evaluates v_u in both or in none; the delta kept is the later one.

    Args:
        scale: w, 1 means no guidance.
        every: from 1, which is CFG. 2 saves a quarter of the evaluations, N steps save (every - 1) / (2 every) of them.

    Raises:
        ValueError: scale is not a finite number, or every is not an integer from 1 on.
    """

    scale: float
    every: int = 2
    space: ClassVar[noise.Space] = "flow"
    affine: ClassVar[bool] = False  # from one level to another a delta changes differently in each space
    examples: ClassVar[tuple[str, ...]] = ("ReuseDelta(3.0)", "ReuseDelta(2.0, every=3)")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        check_count(self, "every", 1)

    def reuses(self, info: StepInfo, kept: Kept | None) -> bool:
        """Whether this evaluation takes the delta of an earlier step."""
        return kept is not None and 0 < info.index - kept.step < self.every

    def plan(self, info: StepInfo, state: Kept | None) -> tuple[Branch, ...]:
        return (COND,) if self.reuses(info, state) else super().plan(info, state)

    def rule(self, info: StepInfo, predictions: Predictions, state: Kept | None) -> tuple[Result, Kept]:
        cond = predictions["cond"]
        if state is None or not self.reuses(info, state):
            state = Kept(cond - predictions["uncond"], info.index)
        return Result(cond + (self.weight(info) - 1) * state.delta), state
