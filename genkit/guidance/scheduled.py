"""Guidance weights that change over the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from genkit.guidance.base import Branch, Host, Predictions, Result, StepInfo, _Combinator, check_number

#: Curves over progress u = 0 (first step, pure noise) .. 1 (last step), each with largest value 1. ``p`` is the power.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda u, p: 1.0,
    "linear": lambda u, p: u,
    "inverse_linear": lambda u, p: 1 - u,
    "cosine": lambda u, p: (1 - math.cos(math.pi * u)) / 2,
    "sine": lambda u, p: (1 + math.cos(math.pi * u)) / 2,
    "v": lambda u, p: abs(2 * u - 1),
    "lambda": lambda u, p: 1 - abs(2 * u - 1),
    "power_cosine": lambda u, p: (1 - math.cos(math.pi * u**p)) / 2,
}


@lru_cache(maxsize=256)
def curve(shape: str, power: float, total: int, preserve_mean: bool) -> tuple[float, ...]:
    """The shape at every step of a run of ``total`` steps, 1 if it is 0 at all; divided by its mean over them if asked."""
    values = [SHAPES[shape](i / (total - 1) if total > 1 else 0.5, power) for i in range(total)]
    if not any(values):  # else a run of so few steps would lose its guidance
        values = [1.0] * total
    mean = sum(values) / total if preserve_mean else 1.0
    return tuple(v / mean for v in values)


@dataclass(frozen=True)
class Scheduled(_Combinator):
    """``inner`` with the scale ``w_i = 1 + max(clamp, (w - 1) f_i)``, f a curve over the run (Wang et al. 2024, sec. 4).

    The curve multiplies ``w - 1``, so w = 1 stays no guidance. Where w_i is 1 the other branches are not evaluated. A curve
    that is 0 at every step, as ``lambda`` over 2 and ``v`` over 1, is constant.

    Args:
        inner: a guidance with a ``scale`` (possibly inside other combinators).
        shape: ``constant``; rising: ``linear``, ``cosine``, ``power_cosine``; falling, their mirror images:
            ``inverse_linear``, ``sine``; ``v`` (high, low, high); ``lambda`` (low, high, low).
        power: s of ``power_cosine``, ``(1 - cos(pi u^s)) / 2``: below 1 rises earlier, above 1 later. Others ignore it.
        clamp: c, a floor under ``w_i - 1``, in units of w - 1; 0 is none. sd-webui-incantations suggests 2
            for SD 1.5 and 4 for SDXL.
        preserve_mean: scale the curve so that its mean over the steps is 1 (before the clamp), which gives the factor 2 of
            ``linear`` and ``cosine``; False leaves its largest value at 1, the paper's form of ``power_cosine``.

    Raises:
        ValueError: unknown shape, or a number outside its range.
    """

    shape: str = "linear"
    power: float = 1.0
    clamp: float = 0.0
    preserve_mean: bool = True
    examples: ClassVar[tuple[str, ...]] = (
        "Scheduled(CFG(3.0), 'linear')",
        "Scheduled(CFG(3.0), 'linear', clamp=1.0)",
        "Scheduled(APG(4.0), 'power_cosine', power=0.5)",
        "Scheduled(Interval(CFG(3.0), 0.1, 20.0), 'lambda')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ValueError(f"Scheduled: shape={self.shape!r} is unknown; use one of {', '.join(SHAPES)}")
        if not isinstance(self.preserve_mean, bool):
            raise ValueError(f"Scheduled: preserve_mean={self.preserve_mean!r} must be True or False")
        check_number(self, "power", 0.0, 1e6, inside=True)
        check_number(self, "clamp", 0.0, 1e6)

    def at(self, info: StepInfo) -> StepInfo:
        """The step as ``inner`` sees it: with the scheduled weight as its override."""
        gamma = (self.scale if info.weight is None else info.weight) - 1
        if gamma == 0 or (self.shape == "constant" and self.clamp <= gamma):
            return info
        gamma *= curve(self.shape, self.power, info.total, self.preserve_mean)[info.index]
        return info._replace(weight=1 + (max(gamma, self.clamp) if self.clamp else gamma))

    def weight(self, info: StepInfo) -> float:
        return self.inner.weight(self.at(info))

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return self.inner.prepare(self.at(info), run, state)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.inner.plan(self.at(info), state)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return self.inner.combine(self.at(info), predictions, state)

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        return self.inner.refine(self.at(info), result, run, state)
