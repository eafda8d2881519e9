"""What guidance by a network weakened in some of its layers has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.guidance.base import COND, Branch, Guidance, Need, Perturbation, Predictions, Result, StepInfo, check_number


@dataclass(frozen=True)
class _Perturbed(Guidance):
    """``D = D_c + (w - 1)(D_c - D_p)``: D_p is the prediction of the weakened network, with the same condition."""

    scale: float
    requires: ClassVar[frozenset[Need]] = frozenset({"perturb"})

    def __post_init__(self) -> None:
        check_number(self, "scale")
        layers = self.perturbation.layers
        if not isinstance(layers, tuple | list) or not all(isinstance(name, str) and name for name in layers):
            raise ValueError(
                f"{type(self).__name__}: layers={layers!r} must be a tuple of names, such as ('mid',); () is the default"
            )
        object.__setattr__(self, "layers", tuple(layers))

    @property
    def perturbation(self) -> Perturbation:
        """How the network is weakened."""
        raise NotImplementedError

    @property
    def branch(self) -> Branch:
        """The weakened prediction; its name tells different perturbations apart."""
        kind, layers, sigma = self.perturbation
        details = [*layers, *([f"sigma={sigma:g}"] if kind == "blur" else [])]
        return Branch(f"{kind}({', '.join(details)})" if details else kind, perturbation=self.perturbation)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, self.branch)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        # lerp is D_p + w (D_c - D_p), the same thing in one operation.
        return Result(cond if w == 1 else predictions[self.branch.name].lerp(cond, w)), state
