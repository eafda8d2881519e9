"""Every registered metric as a ``torchmetrics.Metric``, for training loops and ``accelerate launch``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genkit_eval.metrics import METRICS, Pair, Sample


class RegisteredMetric(Metric):
    """The metric ``name`` of the registry against ``reference``.

    ``update`` takes features (B, D), or uint8 pixels (B, 3, H, W) for a pixel metric (saturation, contrast, clipped). ``compute``
    gathers all ranks and returns a float64 scalar: the same function, on the same numbers, as the command uses.
    ``kwargs`` go to ``torchmetrics.Metric``. Raises ValueError for an unknown name.
    """

    full_state_update = False
    is_differentiable = False
    batches: list[Tensor]

    def __init__(self, name: str, reference: Sample, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in METRICS:
            raise ValueError(f"name: got {name!r}; one of {', '.join(sorted(METRICS))} works")
        self.spec = METRICS[name]
        self.reference = reference
        self.add_state("batches", default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As the registry says; None where neither direction is better."""
        return {"higher": True, "lower": False, "neither": None}[self.spec.better]

    def update(self, batch: Tensor) -> None:
        """Add features (B, D) or uint8 pixels (B, 3, H, W)."""
        self.batches.append(batch.detach())

    def compute(self) -> Tensor:
        """The metric over everything seen since the last reset."""
        seen = (self.batches if isinstance(self.batches, Tensor) else torch.cat(self.batches)).cpu()
        if self.spec.source == "features":
            fake = Sample(seen)
        else:
            fake = Sample(torch.zeros(len(seen), self.reference.features.shape[1]), pixels=seen)
        return torch.tensor(self.spec.value(Pair(self.reference, fake)), dtype=torch.float64)
