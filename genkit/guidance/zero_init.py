"""Standing still in the first steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from genkit import noise
from genkit.guidance.base import Branch, Host, Predictions, Result, StepInfo, _Combinator, check_count


@dataclass(frozen=True)
class ZeroInit(_Combinator):
    """``v = 0`` in the first ``steps`` steps, then ``inner`` (CFG-Zero*, Fan et al. 2025).

    v is the flow velocity, so the estimate there is ``D = x / (alpha + s)``. Nothing is evaluated in these steps: NFE 0. Without
    guidance (scale 1) the combinator does nothing. It belongs outermost: what is around it gets no predictions in these steps,
    and a schedule around it that sets the scale to 1 there, as ``linear`` does in the first step, turns it off.

    Args:
        inner: any guidance; it sees nothing of these steps.
        steps: how many, from 0. 1 is diffusers' ``zero_init_steps=1`` and the authors' ``zero_steps=0`` (they zero
            ``i <= zero_steps``). They used about 4 % of the steps.

    Raises:
        ValueError: steps is not an integer from 0 on.
    """

    steps: int = 1
    logits: ClassVar[bool | None] = False  # it sets a velocity to zero
    examples: ClassVar[tuple[str, ...]] = ("ZeroInit(CFGZeroStar(3.0))", "ZeroInit(Scheduled(CFG(2.0), 'sine'), steps=2)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps", 0)

    def still(self, info: StepInfo) -> bool:
        """Whether this step stands still. A weight that only a schedule or gate inside has set to 1 does not prevent it."""
        return info.index < self.steps and (self.scale if info.weight is None else info.weight) != 1

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return state if self.still(info) else self.inner.prepare(info, run, state)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return () if self.still(info) else self.inner.plan(info, state)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        if self.still(info):
            return Result(noise.to_x0(torch.zeros_like(info.x), info.x, info.alpha, info.s, "flow")), state
        return self.inner.combine(info, predictions, state)

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        return (result, state) if self.still(info) else self.inner.refine(info, result, run, state)
