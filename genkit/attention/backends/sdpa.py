"""torch's scaled_dot_product_attention: as torch chooses, or one of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.attention.base import HALF, AttentionBackend, Request, by_blocks, register_backend
from genkit.attention.masks import BlockCausal, Causal, Mask

#: Queries per block from which one call for each block takes less time than one call with a mask, on a CPU.
BLOCK = 16


class SDPA(AttentionBackend):
    name = "sdpa"
    note = "torch's own choice among its kernels: the default"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        q_len, k_len = q.shape[2], k.shape[2]
        grouped = q.shape[1] != k.shape[1]
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        if isinstance(mask, Causal) and q_len == k_len:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        if isinstance(mask, BlockCausal) and self.block_by_block(q, mask):
            return by_blocks(self, q, k, v, mask, scale)
        look = mask.dense(q_len, k_len, q.device)
        return F.scaled_dot_product_attention(q, k, v, look, scale=scale, enable_gqa=grouped)

    def block_by_block(self, q: Tensor, mask: BlockCausal) -> bool:
        return q.device.type == "cpu" and q.shape[2] >= BLOCK * len(mask.sizes)


class Kernel(SDPA):
    """One kernel of torch's, and an error where it cannot do the call."""

    def __init__(self, name: str, kernel: SDPBackend, note: str) -> None:
        self.name, self.kernel, self.note = f"sdpa:{name}", kernel, note

    def available(self) -> str | None:
        on_cpu = self.kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
        return None if on_cpu or torch.cuda.is_available() else "it computes on CUDA only, and no such device is here"

    def supports(self, request: Request) -> str | None:
        found = super().supports(request)
        if found or self.kernel is SDPBackend.MATH:
            return found
        flash = self.kernel is SDPBackend.FLASH_ATTENTION
        if request.device not in (("cpu", "cuda") if flash else ("cuda",)):
            return f"tensors are on {request.device}; torch has this kernel for CUDA{' and the CPU' if flash else ''} only"
        if request.head_dim != request.value_dim:
            return f"heads of q and v differ in width, {request.head_dim} and {request.value_dim}"
        if request.device == "cpu":
            return None
        return self._on_cuda(request)

    def _on_cuda(self, request: Request) -> str | None:
        """torch answers other calls with "No available kernel"."""
        if self.kernel is not SDPBackend.EFFICIENT_ATTENTION and request.dtype not in HALF:
            return f"q is {request.dtype}; on CUDA it takes torch.bfloat16, torch.float16"
        if self.kernel is SDPBackend.EFFICIENT_ATTENTION and request.kv_heads != request.heads:
            return "torch has this kernel without grouped queries only"
        if self.kernel is not SDPBackend.EFFICIENT_ATTENTION and request.head_dim > 256:
            return f"heads are {request.head_dim} wide; it takes up to 256"
        mask, square = request.mask, request.q_len == request.k_len
        if self.kernel is SDPBackend.FLASH_ATTENTION and not (
            mask is None or mask.kind == "block_causal" or (mask.kind == "causal" and square)
        ):
            return f"the mask is {type(mask).__name__}; on CUDA it takes none, BlockCausal, and Causal without a cache"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        with sdpa_kernel(self.kernel):
            return super().__call__(q, k, v, mask, scale)

    def block_by_block(self, q: Tensor, mask: BlockCausal) -> bool:
        flash_on_cuda = self.kernel is SDPBackend.FLASH_ATTENTION and q.device.type == "cuda"
        return flash_on_cuda or super().block_by_block(q, mask)


register_backend(SDPA())
register_backend(Kernel("flash", SDPBackend.FLASH_ATTENTION, "the tiled kernel of FlashAttention; on a CPU with any mask"))
register_backend(Kernel("efficient", SDPBackend.EFFICIENT_ATTENTION, "the memory-efficient kernel, with any mask"))
register_backend(Kernel("cudnn", SDPBackend.CUDNN_ATTENTION, "cuDNN's kernel, often the fastest on Hopper"))
register_backend(Kernel("math", SDPBackend.MATH, "matrix products and softmax, in every dtype"))
