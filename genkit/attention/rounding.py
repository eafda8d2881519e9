"""Attention with every operation rounded to a chosen mantissa: what tiles and low-precision accumulators do to the result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Explicit mantissa bits of the floating-point types.
MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def round_mantissa(x: Tensor, bits: int) -> Tensor:
    """x (float64) to the nearest number with ``bits`` explicit mantissa bits, ties to even; the exponent is not limited.

    Args:
        bits: 0 to 52; 23 is float32, 10 float16, 7 bfloat16, 52 leaves x as it is.

    Raises:
        ValueError: x is not float64, or bits are outside their range.
    """
    if x.dtype != torch.float64:
        raise ValueError(f"x has dtype {x.dtype}: rounding is emulated in float64, so give x.double()")
    if not 0 <= bits <= 52:
        raise ValueError(f"bits={bits}: give 0 to 52 mantissa bits (float32 has 23, float16 10, bfloat16 7)")
    if bits == 52:
        return x
    mantissa, exponent = torch.frexp(x)  # |mantissa| in [0.5, 1), so its first bit is the implicit one
    # In float64 too, the power of two: of an integer tensor it would be taken in float32.
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)), (exponent - (bits + 1)).double())


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bits: int = 52, tile: int | None = None, scale: float | None = None
) -> Tensor:
    """FlashAttention's online softmax over tiles of keys, in float64 with each operation's result rounded.

    For each tile with scores ``S_j = scale q k_j^T``: ``m' = max(m, max S_j)``, ``a = exp(m - m')``, ``P = exp(S_j - m')``,
    ``l = a l + sum P``, ``o = a o + P v_j``, at the end ``o / l``. A sum over a tile is rounded once; the accumulators l and o
    are rounded at every tile, so more tiles are more roundings. With one tile it is the plain softmax.

    Args:
        q, k, v: (B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, D); converted to float64, not rounded themselves.
        bits: mantissa bits kept, see :func:`round_mantissa`.
        tile: keys per tile, 1 or more; None is all of them.
        scale: None is 1 / sqrt(D).

    Returns:
        (B, H, Tq, D) in float64.

    Raises:
        ValueError: bits or tile outside their range.

    Golden et al. 2024, "Is Flash Attention Stable?" (arXiv 2405.02803), section 3, the numerical emulation.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile}: give 1 or more keys per tile, or None for all")

    def r(x: Tensor) -> Tensor:
        return round_mantissa(x, bits)

    q, k, v = q.double(), k.double(), v.double()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    largest = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, out = torch.zeros_like(largest), q.new_zeros(*q.shape[:-1], v.shape[-1])
    for keys, values in zip(k.split(tile or k.shape[-2], -2), v.split(tile or k.shape[-2], -2), strict=True):
        scores = r(scale * r(q @ keys.mT))
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        shrink, weights = r(torch.exp(r(largest - new))), r(torch.exp(r(scores - new)))
        total = r(r(shrink * total) + r(weights.sum(-1, keepdim=True)))
        out = r(r(shrink * out) + r(weights @ values))
        largest = new
    return r(out / total)
