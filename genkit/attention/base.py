"""What a backend of attention is, and the table of all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.attention.masks import KINDS, BlockCausal, Mask

ALL_KINDS = frozenset(KINDS)
HALF = frozenset({torch.float16, torch.bfloat16})


class Unavailable(ValueError):
    """A backend that was asked for by name cannot be used: not here, or not for this call."""


class Request(NamedTuple):
    """One call of attention, as far as the choice of a backend depends on it. ``mask`` is reduced to these lengths."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    mask: Mask | None
    grad: bool


class AttentionBackend:
    """A way to compute ``softmax(scale q k^T) v``. Make one, and give it to :func:`register_backend`.

    Attributes:
        name: what it is asked for by. note: what it is for, in one line.
        exact: False where the result is approximate by design; then it is used only if asked for by name.
        optional: it needs a package that genkit does not, imported only when it is asked for by name or by the report.
        devices, dtypes, masks: what it can do; None for all. largest_head: the widest head. differentiable: has gradients.
    """

    name: str = ""
    note: str = ""
    exact: bool = True
    optional: bool = False
    devices: tuple[str, ...] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    masks: frozenset[str] = ALL_KINDS
    largest_head: int | None = None
    differentiable: bool = True

    def available(self) -> str | None:
        """Why it cannot be used on this machine; None if it can. What it raises counts as a reason, and as broken."""
        return None

    def supports(self, request: Request) -> str | None:
        """Why it cannot do this call; None if it can."""
        if self.devices is not None and request.device not in self.devices:
            return f"tensors are on {request.device}; it computes on {', '.join(self.devices)}"
        if self.dtypes is not None and request.dtype not in self.dtypes:
            return f"q is {request.dtype}; it takes {', '.join(sorted(str(dtype) for dtype in self.dtypes))}"
        if request.mask is not None and request.mask.kind not in self.masks:
            known = ", ".join(KINDS[kind].__name__ for kind in sorted(self.masks)) or "none"
            return f"the mask is {type(request.mask).__name__}; it takes {known}"
        if self.largest_head is not None and max(request.head_dim, request.value_dim) > self.largest_head:
            return f"heads are {max(request.head_dim, request.value_dim)} wide; it takes up to {self.largest_head}"
        if request.grad and not self.differentiable:
            return "gradients are wanted (a tensor requires_grad), which it does not have"
        return None

    def automatic(self, request: Request) -> bool:
        """Whether it should do this call when nobody asked for a backend, in place of ``sdpa``."""
        return False

    def version(self) -> str | None:
        """Of the package it comes from, where that is not torch."""
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        """(B, H, Tq, Dv) of q (B, H, Tq, D), k (B, Hk, Tk, D), v (B, Hk, Tk, Dv), H a multiple of Hk; ``mask`` is reduced."""
        raise NotImplementedError


BACKENDS: dict[str, AttentionBackend] = {}
#: Those that may do a call that asks for no backend, beside ``sdpa``.
AUTOMATIC: list[AttentionBackend] = []
#: Why each backend cannot be used here (None if it can), as far as it has been tried.
REASONS: dict[str, str | None] = {}


def register_backend(backend: AttentionBackend) -> AttentionBackend:
    """Make a backend known under its name, in place of another of that name.

    Raises:
        ValueError: it has no name, or one that stands for the choice by capability.
    """
    if not backend.name or backend.name == "auto":
        raise ValueError(f"name={backend.name!r} of a backend must be a word of its own, such as 'mine'")
    BACKENDS[backend.name] = backend
    AUTOMATIC[:] = [b for b in BACKENDS.values() if type(b).automatic is not AttentionBackend.automatic]
    REASONS.pop(backend.name, None)
    return backend


def by_blocks(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, mask: BlockCausal, scale: float | None) -> Tensor:
    """A block-causal mask as one call for each block, without a mask: its queries see all keys up to the block's end."""
    parts = mask.parts(q.shape[2], k.shape[2])
    return torch.cat([backend(q[:, :, begin:end], k[:, :, :keys], v[:, :, :keys], None, scale) for begin, end, keys in parts], 2)
