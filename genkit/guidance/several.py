"""What guidances made of several others share: a state for each, and one rule for passing a scale on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genkit.guidance.base import Guidance, StepInfo


@dataclass(frozen=True)
class _Several(Guidance):
    """A guidance over ``parts``, whose state is the tuple of theirs.

    Its ``scale`` is that of the part farthest from 1. An override w is passed on as a gain: part k gets
    ``1 + (w_k - 1) (w - 1) / (scale - 1)``, so at w = 1 no part guides, and parts of equal scale, 1 too, all get w.
    """

    @property
    def scale(self) -> float:
        """The scale farthest from 1 among the parts."""
        return farthest([scale_of(part) for part in self.parts])

    def seen(self, info: StepInfo) -> tuple[StepInfo, ...]:
        """The step as each part sees it: with its share of an override."""
        if info.weight is None or self.scale == 1:
            return (info,) * len(self.parts)
        gain = (info.weight - 1) / (self.scale - 1)
        return tuple(info._replace(weight=1 + (scale_of(part) - 1) * gain) for part in self.parts)

    def init(self, batch: int) -> tuple[Any, ...]:
        return tuple(part.init(batch) for part in self.parts)


def scale_of(guidance: Guidance) -> float:
    """The scale of a guidance before any override; 1 for one that has none."""
    return float(getattr(guidance, "scale", 1.0))


def farthest(scales: list[float]) -> float:
    """The scale that guides most, up or down; 1 if there is none."""
    return max(scales, key=lambda w: abs(w - 1), default=1.0)
