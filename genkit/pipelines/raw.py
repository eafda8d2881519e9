"""Guidances that mean the same for a network's raw predictions as for clean-image estimates."""

from __future__ import annotations

from genkit.guidance.base import Guidance
from genkit.guidance.cfg import CFG
from genkit.guidance.interval import Interval
from genkit.guidance.none import NoGuidance
from genkit.guidance.piecewise import Piecewise
from genkit.guidance.scheduled import Scheduled
from genkit.guidance.sum import Sum

#: Beside being affine in the predictions, they look at no image, and keep nothing from one level to the next.
ANY_SPACE = (CFG, Interval, NoGuidance, Piecewise, Scheduled, Sum)


def in_any_space(guidance: Guidance) -> bool:
    """Whether its rule, with those of all its parts, may be given raw predictions, and then returns a raw one."""
    # The class itself: a subclass may have another rule.
    return type(guidance) in ANY_SPACE and all(in_any_space(part) for part in guidance.parts)


__all__ = ["ANY_SPACE", "in_any_space"]
