"""CFG++: guidance that adds noise back along the unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from genkit.guidance.base import Need, Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.levels import noise_level


@dataclass(frozen=True)
class CFGPP(CondUncond):
    """``D = D_u + lambda (D_c - D_u)``, with noise added back along D_u: ``n_hat = (x - alpha D_u) / s`` (Chung et al. 2024).

    ``form="renoise"`` does this through the solver. ``form="schedule"`` is CFG with the weight
    ``w_i = lambda sigma_i / (sigma_i - sigma_{i+1})``: the same trajectory in Euler and in DDIM with eta = 0, for hosts without
    a renoise hook. In other solvers the two forms differ. In corrector stages, which go to no lower level, ``w_i = lambda``.

    lambda is not a guidance scale: at lambda = 1 noise is still added back along D_u, and lambda = 0 samples unconditionally.
    ``scale``, 1 being no guidance as everywhere, is here the share of CFG++: with d = D_c - D_u the estimate is
    ``D_c + (w - 1)(lambda - 1) d``, and ``D_c - (w - 1) d`` in n_hat. w = 2 is the method as published.

    Args:
        strength: lambda; the paper's range is 0 to 1, the authors' default 0.6.
        form: ``"renoise"`` (any solver that offers a direction) or ``"schedule"`` (any host).
        scale: w; leave it at 2 and let combinators change it.

    Raises:
        ValueError: an argument that is not a finite number, or an unknown form; in a run, "schedule" where steps have no noise
            level.
    """

    strength: float = 0.6
    form: Literal["renoise", "schedule"] = "renoise"
    scale: float = 2.0
    logits: ClassVar[bool | None] = False  # it mixes noise levels
    examples: ClassVar[tuple[str, ...]] = ("CFGPP(0.6)", "CFGPP(0.8, 'schedule')", "CFGPP(1.0, scale=1.5)")

    def __post_init__(self) -> None:
        check_number(self, "strength")
        check_number(self, "scale")
        if self.form not in ("renoise", "schedule"):
            raise ValueError(f"CFGPP: form={self.form!r} must be 'renoise' or 'schedule'")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"direction"}) if self.form == "renoise" else frozenset()

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        share, cond, uncond = self.weight(info) - 1, predictions["cond"], predictions["uncond"]
        if self.form == "renoise":
            return Result(uncond.lerp(cond, 1 + share * (self.strength - 1)), uncond.lerp(cond, 1 - share)), state
        sigma = noise_level(info, "CFGPP: form='schedule'", "CFG or another method that knows no noise levels")
        # A correction stays at one level: there the estimate is as in renoise.
        weight = self.strength if info.stage == "corrector" else self.strength / (1 - info.sigma_next / sigma)
        return Result(uncond.lerp(cond, 1 + share * (weight - 1))), state
