"""Guidance away from the past of the trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from genkit.guidance.base import Branch, Guidance, Host, Predictions, Result, StepInfo, check_number
from genkit.guidance.postprocess import _PostProcess
from genkit.noise import Space


class MomentumState(NamedTuple):
    inner: Any
    average: Tensor | None


@dataclass(frozen=True)
class MomentumGuidance(_PostProcess):
    """``g + (w - 1)(g - m)``, then ``m <- (1 - beta) g + beta m``, g being ``inner`` (Liao et al. 2026, whose alpha is w - 1).

    It needs no evaluation of its own: around ``NoGuidance()`` it costs one a step. At the first evaluation m = g. An override of
    the weight replaces w, and leaves ``inner`` its own, but 1 turns both off. Evaluations at w = 1, and steps in which nothing is
    evaluated (:class:`ZeroInit`), do not move m.

    Args:
        inner: any guidance that does not ask for ``refine``.
        scale: w, 1 means no momentum.
        beta: decay of the average, from 0 (the last evaluation alone) to 1 exclusive.
        space: where g and m are kept: ``"flow"``, the paper's; ComfyUI packs use ``"x0"``.

    Raises:
        ValueError: an argument outside its range, an unknown space, or an inner guidance that asks for ``refine``.
    """

    scale: float = 1.5
    beta: float = 0.6
    space: Space = field(default="flow", kw_only=True)  # type: ignore[misc]
    examples: ClassVar[tuple[str, ...]] = ("MomentumGuidance(NoGuidance(), 1.5)", "MomentumGuidance(CFG(3.0), 1.3, 0.8)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "scale")
        check_number(self, "beta", 0.0, 1.0)
        if self.beta == 1:
            raise ValueError("MomentumGuidance: beta=1.0 must be below 1: the average would never move")

    def weight(self, info: StepInfo) -> float:
        return Guidance.weight(self, info)

    def init(self, batch: int) -> MomentumState:
        return MomentumState(self.inner.init(batch), None)

    def prepare(self, info: StepInfo, run: Host, state: MomentumState) -> MomentumState:
        return state._replace(inner=self.inner.prepare(inside(info), run, state.inner))

    def plan(self, info: StepInfo, state: MomentumState) -> tuple[Branch, ...]:
        return self.inner.plan(inside(info), state.inner)

    def combine(self, info: StepInfo, predictions: Predictions, state: MomentumState) -> tuple[Result, MomentumState]:
        result, inner = self.inner.combine(inside(info), predictions, state.inner)
        w = self.weight(info)
        if w == 1 or not predictions:  # without a prediction the estimate is no place the model has been
            return result, state._replace(inner=inner)
        guided = self.native(info, result.denoised)
        average = guided if state.average is None else state.average
        result = self.changed(info, result, lambda g: g + (w - 1) * (g - average))
        return result, MomentumState(inner, guided.lerp(average, self.beta))


def inside(info: StepInfo) -> StepInfo:
    """The step as ``inner`` sees it: an override of the weight goes no further, unless it turns guidance off."""
    return info if info.weight in (None, 1) else info._replace(weight=None)
