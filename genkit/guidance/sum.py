"""Two guidances at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import COND, Branch, Guidance, Host, Predictions, Result, StepInfo, check_guidance
from genkit.guidance.several import _Several, farthest


@dataclass(frozen=True)
class Sum(_Several):
    """``D = D_c + (D_first - D_c) + (D_second - D_c)``: what each adds to the conditional prediction, in x0 space.

    Branches that both ask for are evaluated once. Directions and scores add up in the same way; ``refine`` hooks run one after
    the other. Three or more: ``Sum(Sum(a, b), c)``. D_c, with the condition as it is, is always evaluated: what stands still
    (:class:`ZeroInit`) or changes conditions (:class:`CADS`) belongs around a sum, not into it.

    Its ``scale`` is that of the part farthest from 1. A combinator that sets it to w gives part k the scale
    ``1 + (w_k - 1) (w - 1) / (scale - 1)``: both pushes are multiplied by the same gain. Where both scales are 1, each
    part gets w.

    Args:
        first, second: any guidances.

    Raises:
        TypeError: an argument is not a guidance.
    """

    first: Guidance
    second: Guidance
    examples: ClassVar[tuple[str, ...]] = (
        "Sum(CFG(3.0), Autoguidance(2.0))",
        "Sum(Interval(APG(4.0, momentum=-0.5), 0.1, 1.5), Adaptive(CFG(2.0), 0.99))",
        "Sum(Sum(CFG(2.0), RectifiedCFGPP(1.5)), CFGPP(0.6))",
    )

    def __post_init__(self) -> None:
        check_guidance(self, "first")
        check_guidance(self, "second")

    def weight(self, info: StepInfo) -> float:
        return farthest([part.weight(at) for part, at in zip(self.parts, self.seen(info), strict=True)])

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return tuple(part.prepare(at, run, s) for part, at, s in zip(self.parts, self.seen(info), state, strict=True))

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return tuple(merge(self.plans(info, state)).values())

    def plans(self, info: StepInfo, state: Any) -> list[tuple[Branch, ...]]:
        """What each part asks for."""
        return [part.plan(at, s) for part, at, s in zip(self.parts, self.seen(info), state, strict=True)]

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        plans, cond = self.plans(info, state), predictions["cond"]
        merged = merge(plans)
        results, states = [], []
        for part, at, s, branches in zip(self.parts, self.seen(info), state, plans, strict=True):
            own = {b.name: only_asked(b, predictions[merged[content(b)].name], cond) for b in branches}
            result, s = part.combine(at, own, s)
            results.append(result)
            states.append(s)
        return add(results[0], results[1], cond), tuple(states)

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        states = []
        for part, at, s in zip(self.parts, self.seen(info), state, strict=True):
            result, s = part.refine(at, result, run, s)
            states.append(s)
        return result, tuple(states)


def add(first: Result, second: Result, cond: Tensor) -> Result:
    """Both results as pushes away from ``cond``, added."""
    direction, score = None, first.score
    if first.direction is not None or second.direction is not None:
        a, b = (r.denoised if r.direction is None else r.direction for r in (first, second))
        direction = a + (b - cond)
    if second.score is not None:
        score = second.score if score is None else score + second.score
    stats = {name: value for name, value in {**second.stats, **first.stats}.items() if name != "weight"}  # of one part only
    return Result(first.denoised + (second.denoised - cond), direction, stats, score)


def content(branch: Branch) -> Branch:
    """What decides a prediction: all of the branch but its name and the rows that are wanted."""
    return branch._replace(name="", mask=None)


def merge(plans: list[tuple[Branch, ...]]) -> dict[Branch, Branch]:
    """One branch for each content, cond first: for all rows that any plan wants, and under a name that no other branch has."""
    merged = {content(COND): COND}
    for branch in [b for plan in plans for b in plan]:
        key, name, mask = content(branch), branch.name, branch.mask
        if key in merged:
            name, known = merged[key].name, merged[key].mask
            mask = None if mask is None or known is None else mask | known
        else:
            taken = [b.name for b in merged.values()]
            while name in taken:
                name += "'"
        merged[key] = branch._replace(name=name, mask=mask)
    return merged


def only_asked(branch: Branch, prediction: Tensor, cond: Tensor) -> Tensor:
    """The prediction in the rows the branch asks for, and cond in those that only another part wanted."""
    if branch.mask is None:
        return prediction
    return torch.where(branch.mask.to(cond.device).reshape(-1, *[1] * (cond.ndim - 1)), prediction, cond)
