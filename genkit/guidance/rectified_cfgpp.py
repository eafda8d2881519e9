"""Rectified-CFG++: guidance taken one conditional step ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Host, Need, Predictions, Result, StepInfo, check_number
from genkit.noise import FLOW


@dataclass(frozen=True)
class RectifiedCFGPP(Guidance):
    """``v = v_c(x) + (w - 1)(v_c(x_hat) - v_u(x_hat))``, ``x_hat = x + (t' - t) v_c(x)`` (Rectified-CFG++, 2025).

    v is the flow velocity and t the flow time; on other paths x is taken to the flow and back. Three evaluations: one at x, two
    at x_hat. In the second evaluation of a Heun step, which is at t' already, x_hat is x and the rule is CFG.

    Args:
        scale: w, 1 means no guidance (one evaluation). The authors' lambda is w - 1; their demo has 4.5.
        noise: standard deviation of Gaussian noise added to x_hat, from 0; nothing is drawn at 0. The authors have 0.005.
        time: the time the network is told at x_hat. ``"start"``: t, as the authors' code has it in effect. ``"end"``: t', where
            the conditional step ends; the last step, which ends at t' = 0, keeps t.

    Raises:
        ValueError: a number outside its range, or an unknown time.
    """

    scale: float
    noise: float = 0.0
    time: Literal["start", "end"] = "start"
    requires: ClassVar[frozenset[Need]] = frozenset({"refine"})
    examples: ClassVar[tuple[str, ...]] = (
        "RectifiedCFGPP(3.0)",
        "RectifiedCFGPP(2.0, noise=0.005)",
        "RectifiedCFGPP(2.5, time='end')",
    )

    def __post_init__(self) -> None:
        check_number(self, "scale")
        check_number(self, "noise", 0.0, 1e6)
        if self.time not in ("start", "end"):
            raise ValueError(f"RectifiedCFGPP: time={self.time!r} must be 'start' or 'end'")

    @property
    def needs(self) -> frozenset[Need]:
        return self.requires | (frozenset({"noise"}) if self.noise else frozenset())

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return Result(predictions["cond"]), predictions["cond"]

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        w = self.weight(info)
        if w == 1:
            return result, None
        t, (alpha, end) = info.s / (info.alpha + info.s), FLOW(info.sigma_next)
        x = info.x / (info.alpha + info.s)
        x_hat = x + (end - t) / t * (x - state)  # v_c = (x - D_c) / t
        if self.noise:
            x_hat = x_hat + self.noise * run.noise(x_hat, info)
        if self.time == "start" or end == 0:
            alpha, end = 1 - t, t
        ahead = run.evaluate(info._replace(x=x_hat, alpha=alpha, s=end), (COND, UNCOND))
        push = ((w - 1) * t / end) * (ahead["cond"] - ahead["uncond"])  # D = x - t v
        direction = None if result.direction is None else result.direction + push
        return result._replace(denoised=result.denoised + push, direction=direction), None
