"""Every registered metric as a ``torchmetrics.Metric``, for training loops and ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genkit_eval.metrics import METRICS, Pair, Sample, unavailable
from genkit_eval.metrics.frechet import between, gaussian, gaussian_of
from genkit_eval.metrics.moments import Moments

PIXELS = "pixels"


class RegisteredMetric(Metric):
    """The metric ``name`` of the registry against ``reference``, which it keeps every batch for.

    ``update`` takes what ``inputs`` names: features (B, D) of the layer it reads, or uint8 pixels (B, 3, H, W) for a pixel
    metric; a mapping {layer: (B, D)} where it reads several. ``compute`` gathers all ranks, in their order, and returns a float64
    scalar: the same function, on the same numbers, as the command uses. ``reference`` may be None for a metric that needs none;
    ``train`` holds the training images where one is about them. ``kwargs`` go to ``torchmetrics.Metric``.
    Raises ValueError for an unknown name, and on ``compute`` for data that the metric cannot be made from.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, name: str, reference: Sample | None = None, train: Sample | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in METRICS:
            raise ValueError(f"name: got {name!r}; one of {', '.join(sorted(METRICS))} works")
        self.spec = METRICS[name]
        self.reference = Sample(None) if reference is None else reference
        self.train_set = train
        for key in self.inputs:
            self.add_state(f"seen_{key}", default=[], dist_reduce_fx="cat")

    @property
    def inputs(self) -> tuple[str, ...]:
        """What ``update`` takes: names of layers, or "pixels"."""
        return self.spec.inputs or (PIXELS,)

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As the registry says; None where neither direction is better."""
        return {"higher": True, "lower": False, "neither": None}[self.spec.better]

    def update(self, batch: Tensor | Mapping[str, Tensor]) -> None:
        """Add a batch of what ``inputs`` names; a mapping may hold more than that."""
        parts = {self.inputs[0]: batch} if isinstance(batch, Tensor) else batch
        missing = [key for key in self.inputs if key not in parts]
        if missing:
            raise ValueError(f"batch: {self.spec.name} lacks {', '.join(missing)}; a mapping with {', '.join(self.inputs)} works")
        for key in self.inputs:
            getattr(self, f"seen_{key}").append(parts[key].detach())

    def compute(self) -> Tensor:
        """The metric over everything seen since the last reset."""
        seen = {key: self._seen(key) for key in self.inputs}
        pixels = seen.pop(PIXELS, None)
        pair = Pair(self.reference, Sample(None, pixels, layers=seen), self.train_set)
        reason = unavailable(self.spec, pair)
        if reason is not None:
            raise ValueError(f"{self.spec.name} {reason}")
        return torch.tensor(self.spec.value(pair), dtype=torch.float64)

    def _seen(self, key: str) -> Tensor:
        state = getattr(self, f"seen_{key}")
        return (state if isinstance(state, Tensor) else torch.cat(state)).cpu()


class StreamingFrechet(Metric):
    """Frechet distance to ``reference`` from sums alone: memory does not grow with the number of images.

    Features (B, D) are shifted by the reference's mean, summed in float64 with their outer products, and added over ranks. Exact
    where images outnumber dimensions; with fewer, ``RegisteredMetric("frechet", ...)`` has the form that is.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, reference: Sample, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.real = gaussian_of(reference)
        width = len(self.real.mean)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        shifted = features.detach().to(self.total) - self.real.mean.to(self.total)
        self.count += len(shifted)
        self.total += shifted.sum(dim=0)
        self.outer += shifted.T @ shifted

    def compute(self) -> Tensor:
        """The distance over everything seen since the last reset; ValueError for fewer than two images or features with NaN."""
        total, outer, n = self.total.cpu(), self.outer.cpu(), int(self.count)
        if not bool(total.isfinite().all()):
            raise ValueError("features: NaN or infinite values were added")
        moments = Moments(n, self.real.mean + total / max(n, 1), outer - torch.outer(total, total) / max(n, 1))
        return torch.tensor(between(self.real, gaussian(moments)), dtype=torch.float64)
