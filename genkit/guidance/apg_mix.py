"""Classifier-free guidance first, adaptive projected guidance after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.apg import APG
from genkit.guidance.base import Predictions, Result, StepInfo, check_count
from genkit.guidance.cfg import CFG
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.several import _Several


@dataclass(frozen=True)
class APGMix(CondUncond, _Several):
    """``first`` up to and including step ``last``, ``then`` from there on, whose average runs from the start (HunyuanImage 2.1).

    The model's own setting is close to ``APGMix(CFG(3.5), APG(11.0, momentum=-0.5, threshold=10.0), last=5)``: it adds the
    projected update 10 times to D_u, where APG here, like its paper, adds it w - 1 times to D_c. An override of the weight
    multiplies both w - 1 by one factor, as in :class:`Sum`.

    Args:
        first: CFG of the early steps, which settle the layout.
        then: APG of the later ones.
        last: index of the last step of ``first``, from 0; -1 is APG alone.

    Raises:
        TypeError: ``first`` is no CFG, or ``then`` no APG.
        ValueError: ``last`` is not an integer from -1 on.
    """

    first: CFG
    then: APG
    last: int = 5
    affine: ClassVar[bool] = False
    logits: ClassVar[bool | None] = True
    examples: ClassVar[tuple[str, ...]] = ("APGMix(CFG(2.0), APG(4.0, momentum=-0.5, threshold=5.0), last=2)",)

    def __post_init__(self) -> None:
        for name, kind in (("first", CFG), ("then", APG)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"APGMix: {name}={getattr(self, name)!r} must be {kind.__name__}, for example {kind.examples[0]}")
        check_count(self, "last", -1)

    def init(self, batch: int) -> Any:
        return self.then.init(batch)

    def weight(self, info: StepInfo) -> float:
        first, then = self.seen(info)
        return self.first.weight(first) if info.index <= self.last else self.then.weight(then)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        first, then = self.seen(info)
        result, state = self.then.combine(then, predictions, state)
        if info.index <= self.last:
            result, _ = self.first.combine(first, predictions, None)
        return result, state
