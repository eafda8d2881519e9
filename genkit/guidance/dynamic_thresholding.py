"""A high guidance scale within the range of values of a lower one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genkit.guidance.base import Predictions, Result, StepInfo, check_number
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.measures import ratio, spread, working


@dataclass(frozen=True)
class DynamicThresholding(CondUncond):
    """CFG at ``scale``, brought channel by channel into the range CFG has at ``mimic_scale`` (sd-dynamic-thresholding).

    With g and m the two CFG results less their channel means, R(m) = max |m| and R(g) the ``percentile`` of |g|:
    ``clamp(g, -T, T) / T * R(m) + mean``, ``T = max(R(m), R(g))``. Up to ``mimic_scale`` it is CFG. In x0 space, on
    (B, C, ...): channels on axis 1.

    Args:
        scale: w, 1 means no guidance.
        mimic_scale: the scale whose range is kept, in the same convention.
        percentile: above 0, up to 1: share of |g| that is not clamped.
        per_channel: a range for each channel; False: one for the sample. Means are always per channel.
        measure: ``"max"`` as above; ``"std"``: ``g std(m) / std(g) + mean``.
        start: ``"mean"`` as above; ``"zero"``: the result, its mean too, is multiplied by R(m) / R(g) and nothing is clamped.
        phi: share of the result in a mix with CFG at ``scale``, 0 to 1.

    Raises:
        ValueError: an argument outside its range; in a run, samples without an axis behind the channels.
    """

    scale: float
    mimic_scale: float = 7.0
    percentile: float = 1.0
    per_channel: bool = True
    measure: Literal["max", "std"] = "max"
    start: Literal["mean", "zero"] = "mean"
    phi: float = 1.0
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = (
        "DynamicThresholding(12.0, 3.0, per_channel=False)",
        "DynamicThresholding(12.0, 3.0, percentile=0.9, start='zero')",
        "DynamicThresholding(9.0, 2.0, measure='std', phi=0.7)",
    )

    def __post_init__(self) -> None:
        for name in ("scale", "mimic_scale"):
            check_number(self, name)
        for name in ("percentile", "phi"):
            check_number(self, name, 0.0, 1.0)
        if self.percentile == 0:
            raise ValueError("DynamicThresholding: percentile=0.0 must be above 0; 1 clamps nothing by itself")
        if not isinstance(self.per_channel, bool):
            raise ValueError(f"DynamicThresholding: per_channel={self.per_channel!r} must be True or False")
        for name, known in (("measure", ("max", "std")), ("start", ("mean", "zero"))):
            if getattr(self, name) not in known:
                raise ValueError(f"DynamicThresholding: {name}={getattr(self, name)!r} must be one of {', '.join(known)}")

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, like = self.weight(info), predictions["cond"]
        cond, uncond = working(like), working(predictions["uncond"])
        guided = uncond.lerp(cond, w)
        if w > self.mimic_scale:
            if guided.ndim < 3:
                raise ValueError(
                    f"DynamicThresholding: x of shape {tuple(guided.shape)} has one value a channel; it must be (B, C, ...)"
                )
            result = self.in_range(guided.flatten(2), uncond.lerp(cond, self.mimic_scale).flatten(2))
            guided = guided.lerp(result.reshape(guided.shape), self.phi)
        return Result(guided.to(like)), state

    def in_range(self, guided: Tensor, mimic: Tensor) -> Tensor:
        """``guided`` (B, C, N) in the range of ``mimic``."""
        mean = guided.mean(2, keepdim=True)
        centred = guided - mean
        goal, own = self.range_of(mimic - mimic.mean(2, keepdim=True), 1.0), self.range_of(centred, self.percentile)
        if self.start == "zero":
            return guided * ratio(goal, own)
        if self.measure == "std":
            return centred * ratio(goal, own) + mean
        limit = torch.maximum(goal, own)
        return centred.clamp(-limit, limit) * ratio(goal, limit) + mean

    def range_of(self, centred: Tensor, percentile: float) -> Tensor:
        """The measure of (B, C, N), as (B, C, 1), or (B, 1, 1) over all channels."""
        values = centred.flatten(0, 1) if self.per_channel else centred.flatten(1)
        if self.measure == "std":
            size = spread(values)
        else:
            size = quantile(values.abs(), percentile)
        return size.reshape(len(centred), -1, 1)


def quantile(values: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile of each row (R, N), as (R,); ``torch.quantile`` refuses large and half-precision input."""
    if q == 1:
        return values.amax(1)
    ordered, place = values.sort(dim=1).values, q * (values.shape[1] - 1)
    low = int(place)
    return ordered[:, low].lerp(ordered[:, min(low + 1, values.shape[1] - 1)], place - low)
