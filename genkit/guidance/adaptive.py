"""Guidance that stops by itself, sample by sample."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from genkit.guidance.base import COND, Branch, Host, Predictions, Result, StepInfo, _Combinator, check_number

AT_ONCE = (
    "{rule!r} leaves guidance after the first step: at sigma={sigma:.3g} the branches agree by this measure. Use measure='x0', "
    "a higher threshold, or a lower sigma_max"
)


class AdaptiveState(NamedTuple):
    inner: Any
    guided: Tensor  # (B,) bool: the samples guided in this step
    coming: Tensor  # (B,) bool: the samples that will be guided in the next one


@dataclass(frozen=True)
class Adaptive(_Combinator):
    """``inner`` until the branches agree, then the conditional prediction alone (Castillo et al. 2023, sec. 5).

    A sample leaves guidance for good after the step in which ``cos(eps_c, eps_u) >= threshold``, ``eps = (x - alpha D) / s``
    over all axes; each sample of a batch on its own, and always for whole steps.

    At high noise levels eps is nearly x / s for any D, so its cosine starts near 1: a run that starts at a large sigma (EDM's
    80, or a flow near t = 1) would stop at once, and says so in a warning. ``measure="x0"`` compares D_c with D_u instead, whose
    cosine rises during sampling. Without an unconditional branch (PAG, ICG) there is nothing to compare, and it never stops.

    Args:
        inner: a guidance that uses the unconditional branch.
        threshold: gamma-bar in [-1, inf]. Above 1 it never stops. The paper reports a quarter of the
            evaluations saved; which threshold does that depends on the model.
        measure: ``"eps"`` (the paper's) or ``"x0"``.

    Raises:
        ValueError: threshold below -1 or not a number, or an unknown measure.
    """

    threshold: float = 0.991
    measure: Literal["eps", "x0"] = "eps"
    examples: ClassVar[tuple[str, ...]] = (
        "Adaptive(CFG(3.0), 0.9)",
        "Adaptive(APG(4.0, momentum=-0.5), 0.95, measure='x0')",
        "Adaptive(Interval(CFG(3.0), 0.1, 20.0))",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold", -1.0, math.inf)
        if self.measure not in ("eps", "x0"):
            raise ValueError(f"Adaptive: measure={self.measure!r} must be 'eps' or 'x0'")

    def init(self, batch: int) -> AdaptiveState:
        everyone = torch.ones(batch, dtype=torch.bool)
        return AdaptiveState(self.inner.init(batch), everyone, everyone)

    def prepare(self, info: StepInfo, run: Host, state: AdaptiveState) -> AdaptiveState:
        guided = state.coming if info.stage == "step" else state.guided
        return state._replace(inner=self.inner.prepare(info, run, state.inner)) if bool(guided.any()) else state

    def plan(self, info: StepInfo, state: AdaptiveState) -> tuple[Branch, ...]:
        guided = state.coming if info.stage == "step" else state.guided
        branches = self.inner.plan(info, state.inner)
        names = {b.name for b in branches}
        if bool(guided.all()) and ("cond" in names or "uncond" not in names or self.threshold > 1):
            return branches
        cond = next((b for b in branches if b.name == "cond"), COND)  # its own: it may change the condition
        if not bool(guided.any()):
            return (cond,)
        masked = [b._replace(mask=guided if b.mask is None else b.mask & guided) for b in branches if b.name != "cond"]
        return cond, *masked  # cond also where the method inside does without: to compare, and for those that have left

    def combine(self, info: StepInfo, predictions: Predictions, state: AdaptiveState) -> tuple[Result, AdaptiveState]:
        guided = state.coming if info.stage == "step" else state.guided
        if not bool(guided.any()):
            return Result(predictions["cond"], stats={"weight": 1.0}), state._replace(guided=guided)
        result, inner = self.inner.combine(info, predictions, state.inner)
        if not bool(guided.all()):  # else a cond prediction is not needed, and need not be there
            result = only(guided, result, Result(predictions["cond"]))
        coming = state.coming
        blind = self.measure == "eps" and info.alpha == 0 and self.threshold > -1  # pure noise: both eps are x itself
        if info.stage == "step" and not blind and "cond" in predictions and "uncond" in predictions:
            cosine = branch_cosine(info, predictions["cond"], predictions["uncond"], self.measure)
            coming = guided & (cosine < self.threshold).cpu()
            if info.index == 0 < self.threshold and info.total > 1 and not bool(coming.any()):
                warnings.warn(AT_ONCE.format(rule=self, sigma=info.sigma), stacklevel=2)
            result = result._replace(stats={**result.stats, "agreement": float(cosine.detach().cpu()[guided].mean())})
        return result, AdaptiveState(inner, guided, coming)

    def refine(self, info: StepInfo, result: Result, run: Host, state: AdaptiveState) -> tuple[Result, AdaptiveState]:
        if not bool(state.guided.any()):
            return result, state
        refined, inner = self.inner.refine(info, result, run, state.inner)
        return only(state.guided, refined, result), state._replace(inner=inner)


def only(rows: Tensor, result: Result, other: Result) -> Result:
    """``result`` in the samples of ``rows`` (B,) bool, ``other`` in the rest."""
    if bool(rows.all()):
        return result
    keep = rows.to(result.denoised.device).reshape(-1, *[1] * (result.denoised.ndim - 1))
    direction, score = None, None
    if result.direction is not None or other.direction is not None:
        a, b = (r.denoised if r.direction is None else r.direction for r in (result, other))
        direction = torch.where(keep, a, b)
    if result.score is not None or other.score is not None:
        a, b = (torch.zeros_like(r.denoised) if r.score is None else r.score for r in (result, other))
        score = torch.where(keep, a, b)
    return Result(torch.where(keep, result.denoised, other.denoised), direction, result.stats, score)


def branch_cosine(info: StepInfo, cond: Tensor, uncond: Tensor, measure: str) -> Tensor:
    """``cos(eps_c, eps_u)`` or ``cos(D_c, D_u)`` per sample (B,); the factor 1/s of eps cancels."""
    if measure == "eps":
        cond, uncond = info.x - info.alpha * cond, info.x - info.alpha * uncond
    return torch.nn.functional.cosine_similarity(cond.flatten(1), uncond.flatten(1), dim=1)
