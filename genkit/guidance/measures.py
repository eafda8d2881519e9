"""Statistics of predictions, in float32 at least: half precision overflows in sums of squares over thousands of values."""

from __future__ import annotations

import torch
from torch import Tensor


def working(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """One number for each sample (B,), shaped to be broadcast over ``like`` (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def norm(value: Tensor) -> Tensor:
    """Euclidean norm of every sample (B,), over all its axes."""
    out: Tensor = torch.linalg.vector_norm(working(value).flatten(1), dim=1)
    return out


def moments(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every sample, over all its axes, shaped to be broadcast."""
    axes = tuple(range(1, value.ndim))
    return value.mean(axes, keepdim=True), value.std(axes, correction=0, keepdim=True)


def spread(values: Tensor) -> Tensor:
    """Unbiased standard deviation per sample (B, 1, ...); 0 for samples of a single value."""
    flat = working(values).flatten(1)
    return per_sample(flat.std(1, correction=min(1, flat.shape[1] - 1)), values)


def ratio(target: Tensor, size: Tensor) -> Tensor:
    """``target / size``, and 1 where ``size`` is 0 or only rounding beside ``target``: nothing is there to be scaled."""
    real = size > torch.finfo(size.dtype).eps ** 0.5 * target
    return torch.where(real, target / torch.where(real, size, 1), 1)
