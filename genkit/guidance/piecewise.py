"""Different guidances in different parts of a run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from genkit.guidance.base import Branch, Guidance, Host, Predictions, Result, StepInfo, is_number
from genkit.guidance.levels import noise_level
from genkit.guidance.several import _Several

UNITS = ("sigma", "step", "fraction")


@dataclass(frozen=True)
class Piecewise(_Several):
    """``pieces[k]`` in the k-th part of the run, from noise to image, each with a state of its own.

    Like :class:`Interval` it looks at the level at which a step begins, also in its second evaluation: ``Interval(inner, low,
    high)`` is ``Piecewise((NoGuidance(), inner, NoGuidance()), (high, low))``.

    Its ``scale`` is that of the piece farthest from 1. A combinator that sets it to w gives piece k the scale
    ``1 + (w_k - 1) (w - 1) / (scale - 1)``: all pushes are multiplied by the same gain. Where all scales are 1, every
    piece gets w.

    Args:
        pieces: guidances, the first for the highest noise levels.
        bounds: where one piece ends and the next begins, one fewer than pieces, in ``unit``.
        unit: ``"sigma"``: falling EDM noise levels from 0 to inf; piece k acts where ``bounds[k] < sigma <= bounds[k - 1]``.
            ``"step"``: rising step indices; piece k begins at step ``bounds[k - 1]``. ``"fraction"``: the same with
            ``int(bound N)`` for N steps, bounds from 0 to 1.

    Raises:
        TypeError: pieces or bounds are not a tuple (or list), or a piece is not a guidance.
        ValueError: a wrong number of bounds, bounds out of range or in the wrong order, or an unknown unit.
    """

    pieces: tuple[Guidance, ...]
    bounds: tuple[float, ...]
    unit: Literal["sigma", "step", "fraction"] = "sigma"
    examples: ClassVar[tuple[str, ...]] = (
        "Piecewise((CFG(2.0), APG(4.0, momentum=-0.5), NoGuidance()), (2.0, 0.2))",
        "Piecewise((ZeroInit(CFG(3.0)), Autoguidance(2.0)), (2,), 'step')",
        "Piecewise((CFG(5.0), CFG(2.0)), (0.4,), unit='fraction')",
    )

    def __post_init__(self) -> None:
        for name in ("pieces", "bounds"):
            if not isinstance(getattr(self, name), tuple | list):
                raise TypeError(f"Piecewise: {name}={getattr(self, name)!r} must be a tuple, for example {name}=(2.0, 0.3)")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for piece in self.pieces:
            if not isinstance(piece, Guidance):
                raise TypeError(f"Piecewise: pieces has {piece!r}, which must be a guidance, for example CFG(3.0)")
        if self.unit not in UNITS:
            raise ValueError(f"Piecewise: unit={self.unit!r} must be 'sigma', 'step' or 'fraction'")
        if len(self.pieces) != len(self.bounds) + 1:
            raise ValueError(f"Piecewise: bounds={self.bounds!r} must be one fewer than the {len(self.pieces)} pieces")
        self._check_bounds()

    def _check_bounds(self) -> None:
        high = 1.0 if self.unit == "fraction" else math.inf
        if not all(is_number(b) and 0 <= b <= high for b in self.bounds):
            raise ValueError(f"Piecewise: bounds={self.bounds!r} must be numbers from 0 to {high:g}")
        bounds = tuple(float(b) for b in self.bounds)
        order = "falling" if self.unit == "sigma" else "rising"
        if any(a < b if self.unit == "sigma" else a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"Piecewise: bounds={bounds!r} must be {order} in {self.unit!r}: pieces go from noise to image")
        object.__setattr__(self, "bounds", bounds)

    def current(self, info: StepInfo) -> int:
        """The index of the piece that acts in this step."""
        if self.unit == "sigma":
            other = "unit='step' or unit='fraction'"
            return sum(noise_level(info, "Piecewise: unit='sigma'", other) <= b for b in self.bounds)
        starts = self.bounds if self.unit == "step" else [int(b * info.total) for b in self.bounds]
        return sum(info.index >= b for b in starts)

    def weight(self, info: StepInfo) -> float:
        k = self.current(info)
        return self.pieces[k].weight(self.seen(info)[k])

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        k = self.current(info)
        return put(state, k, self.pieces[k].prepare(self.seen(info)[k], run, state[k]))

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        k = self.current(info)
        return self.pieces[k].plan(self.seen(info)[k], state[k])

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        k = self.current(info)
        result, inner = self.pieces[k].combine(self.seen(info)[k], predictions, state[k])
        return result, put(state, k, inner)

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        k = self.current(info)
        result, inner = self.pieces[k].refine(self.seen(info)[k], result, run, state[k])
        return result, put(state, k, inner)


def put(values: tuple[Any, ...], k: int, value: Any) -> tuple[Any, ...]:
    """The tuple with entry k replaced."""
    return (*values[:k], value, *values[k + 1 :])
