"""FlexAttention: a kernel compiled for the rule of the mask, which skips blocks of keys that nobody sees."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from genkit.attention.base import AttentionBackend, Request, register_backend
from genkit.attention.masks import Mask

#: Queries from which skipped blocks pay for the compilation, on CUDA. From other people's reports; not measured here.
LONG = 512


class Flex(AttentionBackend):
    """``compiled=False`` computes the same in several steps, with all scores in memory: for tests."""

    name = "flex"
    note = "compiled for the mask: long sequences in blocks or trees on CUDA; the first call of each shape takes seconds"
    devices = ("cpu", "cuda")
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})

    def __init__(self, compiled: bool = True) -> None:
        self.compiled = compiled

    def available(self) -> str | None:
        if torch.cuda.is_available():
            import_module("triton")  # inductor's kernels for CUDA need it
        return "torch.compile does not work on Windows without a compiler" if sys.platform == "win32" else None

    def supports(self, request: Request) -> str | None:
        if request.device == "cpu" and request.grad:
            return "gradients are wanted (a tensor requires_grad), which it has on CUDA only"
        return super().supports(request)

    def automatic(self, request: Request) -> bool:
        if request.mask is None or request.device != "cuda" or request.q_len < LONG:
            return False
        return request.mask.kind in ("block_causal", "tree")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        block = None if mask is None else block_mask(mask, q, k.shape[2])
        call = _compiled() if self.compiled and not torch.compiler.is_compiling() else flex_attention
        out: Tensor = call(q, k, v, block_mask=block, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Beyond the limit it would run unfused, with all scores in memory.
    options: dict[str, Any] = {"recompile_limit": 64}
    return torch.compile(flex_attention, **options)


def block_mask(mask: Mask, q: Tensor, k_len: int) -> BlockMask:
    """What FlexAttention takes, kept for masks that stay the same."""
    batch = q.shape[0] if mask.batch is not None else None
    heads = q.shape[1] if not mask.fixed else None
    make = _kept if mask.fixed and not torch.compiler.is_compiling() else _block_mask
    return make(mask, batch, heads, q.shape[2], k_len, q.device)


def _block_mask(mask: Mask, batch: int | None, heads: int | None, q_len: int, k_len: int, device: torch.device) -> BlockMask:
    rule, start = mask.rule(q_len, k_len, device), k_len - q_len
    return create_block_mask(lambda b, h, q, k: rule(b, h, q + start, k), batch, heads, q_len, k_len, device=device)


@lru_cache(maxsize=16)
def _kept(mask: Mask, batch: int | None, heads: int | None, q_len: int, k_len: int, device: torch.device) -> BlockMask:
    # A tensor made under inference_mode could not be used in training later.
    with torch.inference_mode(False):
        return _block_mask(mask, batch, heads, q_len, k_len, device)


register_backend(Flex())
