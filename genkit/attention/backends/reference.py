"""The definition of attention, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.attention.base import AttentionBackend, register_backend
from genkit.attention.masks import Mask


class Reference(AttentionBackend):
    name = "reference"
    note = "the definition in float64 (float32 where the device has none): to compare with, slow"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        wide = torch.float32 if q.device.type == "mps" else torch.float64
        group = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
        scores = (q.to(wide) @ keys.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        look = None if mask is None else mask.dense(q.shape[2], k.shape[2], q.device)
        if look is None:
            return (scores.softmax(-1) @ values).to(q.dtype)
        # Not -inf: a row that sees nothing, and its gradient, shall be zero, not NaN.
        weights = scores.masked_fill(~look, torch.finfo(wide).min).softmax(-1) * look
        return (weights @ values).to(q.dtype)


register_backend(Reference())
