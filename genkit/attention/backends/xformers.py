"""xformers' memory_efficient_attention (Lefaudeux et al.), where it is installed and has a kernel."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention.base import HALF, AttentionBackend, Request, by_blocks, register_backend
from genkit.attention.masks import BlockCausal, Causal, Mask


class XFormers(AttentionBackend):
    name = "xformers"
    note = "xformers' memory_efficient_attention"
    optional = True
    dtypes = HALF | {torch.float32}

    def available(self) -> str | None:
        if find_spec("xformers") is None:
            return "xformers is not installed: pip install 'genkit-image[xformers]'"
        # An xformers built for another torch imports, and then finds no kernel: only a call tells.
        x = torch.zeros(1, 8, 1, 32, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float16)
        _operations().memory_efficient_attention(x, x, x)
        return None

    def supports(self, request: Request) -> str | None:
        if request.heads != request.kv_heads:
            return "queries are grouped (fewer heads of keys than of queries)"
        return super().supports(request)

    def version(self) -> str | None:
        return version("xformers")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        if isinstance(mask, BlockCausal):
            return by_blocks(self, q, k, v, mask, scale)
        operations = _operations()
        look = bias = None
        if isinstance(mask, Causal) and q.shape[2] <= k.shape[2]:
            bias = operations.fmha.attn_bias.LowerTriangularFromBottomRightMask()
        elif mask is not None:
            look = mask.dense(q.shape[2], k.shape[2], q.device)
            bias = _bias(look, q, k.shape[2])
        parts = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = operations.memory_efficient_attention(*parts, attn_bias=bias, scale=scale).transpose(1, 2)
        return out if look is None else torch.where(look.any(-1, keepdim=True), out, 0)


def _operations() -> Any:
    # It writes of what it was not built for at every import.
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return import_module("xformers.ops")
    finally:
        log.setLevel(level)


def _bias(look: Tensor | None, q: Tensor, k_len: int) -> Tensor | None:
    """What xformers adds to the scores: of full size, its rows a multiple of 8 apart."""
    if look is None:
        return None
    bias = torch.zeros(look.shape, dtype=q.dtype, device=q.device).masked_fill_(~look, torch.finfo(q.dtype).min)
    padded = F.pad(bias.expand(q.shape[0], q.shape[1], q.shape[2], k_len), (0, -k_len % 8))
    return padded[..., :k_len]


register_backend(XFormers())
