"""Norm and rotary positions of queries and keys, in one pass over both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention.kernels.launch import expandable, floating, fused, shaped, usable

Norm = Literal["l2", "rms"]
EPS = {"l2": 1e-12, "rms": 1e-6, None: 0.0}


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    table: Tensor | None = None,
    *,
    norm: Norm | None = None,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``turn(norm(x) weight)`` for x = q and x = k, computed in float32 and rounded once.

    ``norm`` is ``x / max(|x|, eps)`` (l2) or ``x / sqrt(mean(x^2) + eps)`` (RMS; Zhang & Sennrich 2019, eq. 4), over a head's
    channels. ``turn`` rotates the pairs of channels (2 i, 2 i + 1) (Su et al. 2021, eq. 34).

    Bytes moved: the Triton program reads q, k and the table once and writes both once. Plain torch goes over them for the cast
    to float32, the square, the quotient, the weight, the turn and the cast back: see :func:`bytes_moved`.

    Args:
        q, k: (B, H, T, D) and (B, Hk, T, D) of one dtype and any strides, such as views of one projection.
        table: (T, D / 2, 2), or (1 or B, T, D / 2, 2): cosine and sine of each pair's angle; rows of zeros make zeros. None
            (default): no rotation.
        norm: "l2", "rms" or None (default).
        eps: default 1e-12 for l2, 1e-6 for RMS.
        q_weight, k_weight: what the normed heads are multiplied by: (D,), (H, 1) for a scale per head, or (H, D). None: 1.

    Returns:
        New q and k of the dtype given, contiguous where the Triton program makes them. Differentiable; with gradients, and off
        CUDA, plain torch does it.

    Raises:
        ValueError: an argument of a wrong shape or dtype, or an unknown norm.
    """
    _check(q, k, table, norm)
    table = table[0] if table is not None and table.ndim == 4 and len(table) == 1 else table
    small = EPS[norm] if eps is None else eps
    weights = [
        None if w is None else expandable("qk_norm_rope", name, w, (x.shape[1], x.shape[3]))
        for name, w, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k))
    ]

    def plain() -> tuple[Tensor, Tensor]:
        return _plain(q, table, norm, small, weights[0]), _plain(k, table, norm, small, weights[1])

    if usable(q, k, table, *weights) and k.numel():
        return fused("qk_norm_rope", plain, q, k, table, norm, small, *weights)
    return plain()


def _plain(x: Tensor, table: Tensor | None, norm: Norm | None, eps: float, weight: Tensor | None) -> Tensor:
    f = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "l2":
        f = F.normalize(f, dim=-1, eps=eps)
    elif norm == "rms":
        square: Tensor = torch.linalg.vector_norm(f, dim=-1, keepdim=True).square()
        f = f * (square / f.shape[-1] + eps).rsqrt()
    if weight is not None:
        f = f * weight.to(f)[:, None]
    if table is not None:
        turn = torch.view_as_complex(table.to(f).contiguous())
        f = torch.view_as_real(_complex(f) * (turn[:, None] if turn.ndim == 3 else turn)).flatten(-2)
    f = f.to(x.dtype)
    return f.clone() if f is x else f


def _complex(x: Tensor) -> Tensor:
    """The pairs of neighbours as complex numbers: a view where the strides allow it."""
    pairs = x.unflatten(-1, (-1, 2))
    aligned = pairs.stride(-1) == 1 and not any(n % 2 for n in (pairs.storage_offset(), *pairs.stride()[:-1]))
    return torch.view_as_complex(pairs if aligned else pairs.contiguous())


def _check(q: Tensor, k: Tensor, table: Tensor | None, norm: Norm | None) -> None:
    name = "qk_norm_rope"
    floating(name, q=q, k=k, table=table)
    if norm not in EPS:
        raise ValueError(f"{name}: norm={norm!r} must be 'l2', 'rms' or None")
    if q.ndim != 4:
        raise ValueError(f"{name}: q has shape {tuple(q.shape)}, but must have (B, H, T, D)")
    batch, _, tokens, dim = q.shape
    shaped(name, "k", k, (batch, k.shape[1] if k.ndim == 4 else -1, tokens, dim))
    if k.dtype != q.dtype:
        raise ValueError(f"{name}: k is {k.dtype}, but q is {q.dtype}; give both in one dtype")
    if table is not None:
        if dim % 2:
            raise ValueError(f"{name}: q has heads of {dim} channels, which are no pairs to turn; leave the table out")
        shaped(name, "table", table, (tokens, dim // 2, 2), (1, tokens, dim // 2, 2), (batch, tokens, dim // 2, 2))


def bytes_moved(
    batch: int, heads: int, tokens: int, dim: int, *, kv_heads: int | None = None, itemsize: int = 4,
    norm: Norm | None = "l2", rope: bool = True, weight: bool = False, fused: bool = True,
) -> int:  # fmt: skip
    """Bytes to and from memory of one call, tables included: of the fused program, or of plain torch operation by operation."""
    values = batch * (heads + (heads if kv_heads is None else kv_heads)) * tokens * dim
    turns = 4 * tokens * dim if rope else 0
    if fused:
        return 2 * values * itemsize + turns
    cast = 0 if itemsize >= 4 else 2 * (itemsize + 4)  # to float32 and back
    wide = max(itemsize, 4)
    passes = (3 if norm else 0) + (2 if weight else 0) + (2 if rope else 0)  # the norm reads twice and writes once
    return values * (cast + passes * wide) + (2 * turns if rope else 0)
