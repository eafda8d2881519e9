"""SageAttention (Zhang et al. 2024), where its package is installed: queries and keys in 8 bits."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from genkit.attention.base import HALF, AttentionBackend, Request, by_blocks, register_backend
from genkit.attention.masks import BlockCausal, Causal, Mask


class Sage(AttentionBackend):
    name = "sage"
    note = "the package sageattention: queries and keys in 8 bits"
    exact = False
    optional = True
    devices = ("cuda",)
    dtypes = HALF
    masks = frozenset({"causal", "block_causal"})
    largest_head = 128
    differentiable = False

    def available(self) -> str | None:
        if find_spec("sageattention") is None:
            return "sageattention is not installed"
        call = import_module("sageattention").sageattn
        if not torch.cuda.is_available():
            return "it computes on CUDA only, and no such device is here"
        x = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.float16)
        call(x, x, x, tensor_layout="HND")
        return None

    def supports(self, request: Request) -> str | None:
        if request.mask is not None and request.mask.kind == "causal" and request.q_len != request.k_len:
            return "the mask is Causal with a cache; it takes Causal where there are as many queries as keys"
        if request.head_dim != request.value_dim:
            return f"heads of q and v differ in width, {request.head_dim} and {request.value_dim}"
        return super().supports(request)

    def version(self) -> str | None:
        return version("sageattention")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        if isinstance(mask, BlockCausal):
            return by_blocks(self, q, k, v, mask, scale)
        call = import_module("sageattention").sageattn
        out: Tensor = call(q, k, v, tensor_layout="HND", is_causal=isinstance(mask, Causal), sm_scale=scale)
        return out


register_backend(Sage())
