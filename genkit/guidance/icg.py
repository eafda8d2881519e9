"""Independent condition guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import COND, Branch, Guidance, Host, Need, Predictions, Result, StepInfo, check_number
from genkit.guidance.conditions import drawn, is_embedding, is_label, replaced
from genkit.guidance.measures import moments, working


@dataclass(frozen=True)
class ICG(Guidance):
    """``D = D_c + (w - 1)(D_c - D_r)``: D_r has a random condition (Sadat et al. 2024, "No training, no problem").

    For a condition r drawn independently of x, the prediction given r is that without condition. So a model that was never
    trained without condition can be guided. r is drawn anew in every step, from each sample's own seed: class labels uniformly
    from all classes (the sample's own among them), embeddings from a Gaussian with mean and std of the sample's embedding. In a
    mapping both are known by their names (class_labels, text_embeds, ...); masks, ids and the like stay.

    Args:
        scale: w. 1 means no guidance, and nothing is drawn.

    Raises:
        ValueError: scale is not a finite number; when run: the condition has no embedding, nor class labels of a model that says
            its ``num_classes``.
    """

    scale: float
    requires: ClassVar[frozenset[Need]] = frozenset({"noise"})
    examples: ClassVar[tuple[str, ...]] = ("ICG(3.0)", "ICG(0.5)")

    def __post_init__(self) -> None:
        check_number(self, "scale")

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, Branch("independent", transform=independent))

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        w, cond = self.weight(info), predictions["cond"]
        return Result(cond if w == 1 else predictions["independent"].lerp(cond, w)), state


def independent(condition: Any, info: StepInfo, run: Host) -> Any:
    """A random condition of the same kind."""
    classes = getattr(run.model("main"), "num_classes", None)

    def change(value: Tensor, name: str) -> Tensor | None:
        if is_label(value, name):
            if not classes:
                raise ValueError("ICG draws class labels, but the model neither says its num_classes nor has embed(labels)")
            normal = drawn("ICG", name, torch.empty(len(value), 1, dtype=torch.float64), info, run)
            label: Tensor = (torch.special.ndtr(normal[:, 0]) * classes).long().clamp_max(classes - 1)
            return label.to(value)
        if not is_embedding(value, name):
            return None
        y = working(value)
        mean, std = moments(y)
        return (mean + std * drawn("ICG", name, y, info, run)).to(value)

    return replaced("ICG", condition if classes else run.embed(condition), change)
