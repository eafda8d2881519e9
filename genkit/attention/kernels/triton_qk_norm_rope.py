"""The Triton program of :mod:`genkit.attention.kernels.qk_norm_rope`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.attention.kernels.triton_base import EXACT, constexpr, jit, power_of_two, tl, triton

TILE = 2048  # values a program holds at once


@jit
def _heads(
    x, x_h, x_d, out, out_h, weight, w_h, w_d, table, first, heads, eps,
    D: constexpr, H: constexpr, PAIRS: constexpr, NORM: constexpr, WEIGHTED: constexpr, ROPE: constexpr,
):  # fmt: skip
    """H heads at one place, as pairs of neighbours (H, PAIRS, 2)."""
    head = first + tl.arange(0, H)[:, None, None]
    channel = 2 * tl.arange(0, PAIRS)[None, :, None] + tl.arange(0, 2)[None, None, :]
    here = (head < heads) & (channel < D)
    value = tl.load(x + head * x_h + channel * x_d, here, 0.0).to(tl.float32)
    square = tl.sum(tl.sum(value * value, 2), 1)[:, None, None]
    if NORM == 1:
        value = value / tl.maximum(tl.sqrt(square), eps)
    if NORM == 2:
        value = value * (1.0 / tl.sqrt(square / D + eps))
    if WEIGHTED:
        value = value * tl.load(weight + head * w_h + channel * w_d, here, 0.0).to(tl.float32)
    if ROPE:
        pair = tl.arange(0, PAIRS)
        cos = tl.load(table + 2 * pair, 2 * pair < D, 0.0).to(tl.float32)[None, :]
        sin = tl.load(table + 2 * pair + 1, 2 * pair < D, 0.0).to(tl.float32)[None, :]
        even, odd = tl.split(value)
        value = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(out + head * out_h + channel, value.to(out.dtype.element_ty), here)


@jit
def _program(
    q, q_b, q_h, q_t, q_d, q_out, q_heads, q_weight, qw_h, qw_d,
    k, k_b, k_h, k_t, k_d, k_out, k_heads, k_weight, kw_h, kw_d,
    table, table_b, T, eps, q_blocks,
    D: constexpr, H: constexpr, PAIRS: constexpr, NORM: constexpr, Q_WEIGHTED: constexpr, K_WEIGHTED: constexpr, ROPE: constexpr,
):  # fmt: skip
    """One place of one row; the second axis of the grid runs over blocks of heads, first those of q."""
    place, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = place // T, place % T
    turn = table + b * table_b + t * D
    if block < q_blocks:
        out = q_out + (b * q_heads * T + t) * D
        source = q + b * q_b + t * q_t
        _heads(source, q_h, q_d, out, T * D, q_weight, qw_h, qw_d, turn, block * H, q_heads,
               eps, D, H, PAIRS, NORM, Q_WEIGHTED, ROPE)  # fmt: skip
    else:
        out = k_out + (b * k_heads * T + t) * D
        source = k + b * k_b + t * k_t
        _heads(source, k_h, k_d, out, T * D, k_weight, kw_h, kw_d, turn, (block - q_blocks) * H, k_heads,
               eps, D, H, PAIRS, NORM, K_WEIGHTED, ROPE)  # fmt: skip


def run(
    q: Tensor, k: Tensor, table: Tensor | None, norm: str | None, eps: float, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Takes weights of shape (heads, D), views where they are the same for all heads or channels."""
    (batch, q_heads, tokens, dim), k_heads = q.shape, k.shape[1]
    pairs = power_of_two(max(-(-dim // 2), 1))
    h = min(power_of_two(max(q_heads, k_heads)), max(1, TILE // (2 * pairs)))
    q_blocks = triton.cdiv(q_heads, h)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    sides: list[Any] = []
    for x, out, weight in ((q, outs[0], q_weight), (k, outs[1], k_weight)):
        strides = (0, 0) if weight is None else weight.stride()
        sides += [x, *x.stride(), out, x.shape[1], x if weight is None else weight, *strides]
    rows = q if table is None else table.contiguous()
    per_row = rows.stride(0) if table is not None and table.ndim == 4 else 0
    _program[(batch * tokens, q_blocks + triton.cdiv(k_heads, h))](
        *sides, rows, per_row, tokens, eps, q_blocks,
        D=dim, H=h, PAIRS=pairs, NORM={None: 0, "l2": 1, "rms": 2}[norm],
        Q_WEIGHTED=q_weight is not None, K_WEIGHTED=k_weight is not None, ROPE=table is not None,
        num_warps=4 if h * pairs >= 256 else 1, **EXACT,
    )  # fmt: skip
    return outs[0], outs[1]
