"""FlashAttention 2 (Dao 2023), where its package is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from genkit.attention.base import HALF, AttentionBackend, by_blocks, register_backend
from genkit.attention.masks import BlockCausal, Causal, Mask, Sliding


class Flash(AttentionBackend):
    name = "flash"
    note = "the package flash-attn: grouped queries and sliding windows in half precision"
    optional = True
    devices = ("cuda",)
    dtypes = HALF
    masks = frozenset({"causal", "sliding", "block_causal"})
    largest_head = 256

    def available(self) -> str | None:
        if find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        call = import_module("flash_attn").flash_attn_func
        if not torch.cuda.is_available():
            return "it computes on CUDA only, and no such device is here"
        x = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.float16)
        call(x, x, x)
        return None

    def version(self) -> str | None:
        return version("flash_attn")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        if isinstance(mask, BlockCausal):
            return by_blocks(self, q, k, v, mask, scale)
        window = (mask.window - 1, 0) if isinstance(mask, Sliding) else (-1, -1)
        parts = (x.transpose(1, 2) for x in (q, k, v))
        # Since 2.1 its causal mask ends at the last key and the last query, as ours does.
        out: Tensor = import_module("flash_attn").flash_attn_func(
            *parts, softmax_scale=scale, causal=isinstance(mask, Causal | Sliding), window_size=window
        )
        return out.transpose(1, 2)


register_backend(Flash())
