"""Guidance in the corrector only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.base import COND, Branch, Host, Need, Predictions, Result, StepInfo, _Combinator


@dataclass(frozen=True)
class PredictorCorrector(_Combinator):
    """The conditional prediction in steps, ``inner`` in corrector stages: PCG (Bradley & Nakkiran 2024).

    With ``inner = CFG(gamma)`` the Langevin steps aim at the gamma-powered law ``p(x)^(1 - gamma) p(x|c)^gamma`` of their noise
    level. Needs a sampler with corrector stages (``pcg``). In the limit of small steps, one correction with gamma = 2 w - 1 is
    what CFG(w) does on a DDPM sampler; many corrections sample the gamma-powered law itself. A tool for understanding.

    Args:
        inner: any guidance; its scale is gamma.
    """

    requires: ClassVar[frozenset[Need]] = frozenset({"corrector"})
    examples: ClassVar[tuple[str, ...]] = ("PredictorCorrector(CFG(3.0))", "PredictorCorrector(APG(2.0, momentum=-0.3))")

    def weight(self, info: StepInfo) -> float:
        return self.inner.weight(info) if info.stage == "corrector" else 1.0

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return self.inner.prepare(info, run, state) if info.stage == "corrector" else state

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.inner.plan(info, state) if info.stage == "corrector" else (COND,)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        if info.stage == "corrector":
            return self.inner.combine(info, predictions, state)
        return Result(predictions["cond"]), state

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        return self.inner.refine(info, result, run, state) if info.stage == "corrector" else (result, state)
