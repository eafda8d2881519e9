"""Noise levels, for methods that cannot do without."""

from __future__ import annotations

import math

from genkit.guidance.base import StepInfo


def noise_level(info: StepInfo, setting: str, instead: str) -> float:
    """``info.sigma``. Raises ValueError, with what would work, where steps have none, as in autoregressive models."""
    if math.isnan(info.sigma):
        raise ValueError(f"{setting}, but these steps have no noise level; use {instead}")
    return info.sigma
