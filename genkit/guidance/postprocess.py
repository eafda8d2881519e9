"""Corrections of a guided estimate: what the combinators that change it afterwards share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from genkit import noise
from genkit.guidance.base import COND, Branch, Guidance, Predictions, Result, StepInfo, _Combinator
from genkit.guidance.measures import working


@dataclass(frozen=True)
class _PostProcess(_Combinator):
    """A guidance whose estimate is changed, in a stated space, wherever it is guided."""

    space: noise.Space = field(default="v", kw_only=True)  # type: ignore[misc]  # the user's choice here, not the class's
    affine: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_space(self)
        if "refine" in self.inner.needs:
            raise ValueError(
                f"{type(self).__name__}: inner={self.inner!r} replaces its estimate after this correction, which would be lost; "
                "use a guidance that does not, such as CFG(3.0)"
            )

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        branches = self.inner.plan(info, state)
        has_cond = not branches or any(b.name == "cond" for b in branches)
        return branches if has_cond else (COND, *branches)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        result, state = self.inner.combine(info, predictions, state)
        cond = predictions.get("cond")
        if cond is None or result.denoised is cond or self.weight(info) == 1:
            return result, state  # nothing has been guided
        return self.changed(info, result, lambda guided: self.process(guided, self.native(info, cond))), state

    def process(self, guided: Tensor, cond: Tensor) -> Tensor:
        """The corrected estimate, from the guided and the conditional one (B, ...), all in ``space``."""
        raise NotImplementedError

    def native(self, info: StepInfo, denoised: Tensor) -> Tensor:
        """A clean-image estimate as a prediction in ``space``, in float32 at least."""
        return noise.from_x0(working(denoised), info.x, info.alpha, info.s, self.space)

    def changed(self, info: StepInfo, result: Result, change: Callable[[Tensor], Tensor]) -> Result:
        """The result with its estimate changed by a function that works in ``space``."""
        prediction = change(self.native(info, result.denoised))
        denoised = noise.to_x0(prediction, info.x, info.alpha, info.s, self.space)
        return result._replace(denoised=denoised.to(result.denoised))


def check_space(owner: Guidance) -> None:
    """Raise ValueError unless field ``space`` is one of ``noise.SPACES``."""
    if owner.space not in noise.SPACES:
        raise ValueError(f"{type(owner).__name__}: space={owner.space!r} must be one of {', '.join(noise.SPACES)}")
