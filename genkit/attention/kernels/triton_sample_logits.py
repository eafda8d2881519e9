"""The Triton program of :mod:`genkit.attention.kernels.sample_logits`: a program holds a whole row of logits.

Where a filter needs an order it needs no sorting: top-k and top-p both keep what lies above some threshold, and the threshold is
found by bisection over the 32 bits of a logit, each step one sum over the row. Read as an unsigned integer with the sign turned
over, a float's bits rise with its value, so that after 32 steps the threshold is a logit exactly.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from genkit.attention.kernels.triton_base import EXACT, constexpr, jit, power_of_two, tl


@jit
def _ordered_bits(z):
    """Unsigned integers that rise with z."""
    bits = (z + 0.0).to(tl.uint32, bitcast=True)  # -0 becomes 0, which it equals
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@jit
def _most_above(weight, key, target, INCLUSIVE: constexpr):
    """The greatest t for which the weights of the keys >= t pass the target, or reach it if INCLUSIVE; 0 if none does.

    Terms that are not negative, added in a fixed order: also in floating point the sum does not rise with t.
    """
    t = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = t | bit
        total = tl.sum(tl.where(key >= trial, weight, 0.0), 0)
        passed = total >= target if INCLUSIVE else total > target
        t = tl.where(passed, trial, t)
        bit = bit >> 1
    return t


@jit
def _most_below(weight, key, target):
    """The greatest t for which the weights of the keys < t are at most the target."""
    t = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = t | bit
        t = tl.where(tl.sum(tl.where(key < trial, weight, 0.0), 0) <= target, trial, t)
        bit = bit >> 1
    return t


@jit
def _top_k(key, keep, k):
    """What is left of ``keep``: the k greatest and all that equal the k-th."""
    return keep & (key >= _most_above(keep.to(tl.float32), key, k * 1.0, True))


@jit
def _top_p(z, key, keep, p, RISING: constexpr):
    """What is left of ``keep``; of equals at the edge, those that come first in the row."""
    best = tl.max(tl.where(keep, z, float("-inf")), 0)
    weight = tl.where(keep, tl.exp(z - best), 0.0)
    share = weight / tl.sum(weight, 0)
    if RISING:  # p is 1 - top_p
        edge = _most_below(share, key, p)
        same = (keep & (key == edge)).to(tl.int32)
        beyond = tl.sum(tl.where(key < edge, share, 0.0), 0)
        ahead = tl.sum(same, 0) - tl.cumsum(same, 0) + 1  # itself and its equals that come after it
        inside = beyond + ahead.to(tl.float32) * share > p
    else:
        edge = _most_above(share, key, p, False)
        same = (keep & (key == edge)).to(tl.int32)
        beyond = tl.sum(tl.where(key > edge, share, 0.0), 0)
        ahead = tl.cumsum(same, 0) - 1  # its equals that come before it
        inside = beyond + ahead.to(tl.float32) * share <= p
    first = tl.arange(0, z.shape[0]) == tl.argmax(tl.where(keep, z, float("-inf")), 0)  # stays in every case
    return keep & ((key > edge) | ((same > 0) & inside) | first)


@jit
def _program(
    cond, c_row, uncond, u_row, waits, scale, tokens, w, temperature, k, p, V: constexpr, BLOCK: constexpr,
    GUIDED: constexpr, SCALES: constexpr, TOP_K: constexpr, TOP_P: constexpr, RISING: constexpr, P_FIRST: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keep = i < V
    z = tl.load(cond + row * c_row + i, keep, float("-inf")).to(tl.float32)
    if GUIDED:
        u = tl.load(uncond + row * u_row + i, keep, float("-inf")).to(tl.float32)
        if SCALES:
            w = tl.load(scale + row)
        z = tl.where(keep, tl.where(w < 0.5, u + w * (z - u), z - (z - u) * (1.0 - w)), float("-inf"))
    z = tl.div_rn(z, tl.full([BLOCK], 1.0, tl.float32) * temperature)  # as exact as torch: what was equal stays so
    key = _ordered_bits(z)
    if TOP_P and P_FIRST:
        keep = _top_p(z, key, keep, p, RISING)
    if TOP_K:
        keep = _top_k(key, keep, k)
    if TOP_P and not P_FIRST:
        keep = _top_p(z, key, keep, p, RISING)
    best = tl.max(tl.where(keep, z, float("-inf")), 0)
    wait = tl.load(waits + row * V + i, i < V, 1.0)
    tl.store(tokens + row, tl.argmax(tl.where(keep, tl.exp(z - best) / wait, -1.0), 0).to(tl.int64))


def run(
    cond: Tensor, uncond: Tensor | None, waits: Tensor, scale: float | Tensor,
    temperature: float, top_k: int, top_p: float, order: str,
) -> Tensor:  # fmt: skip
    """Tokens (R,) of rows (R, V)."""
    cond = cond if cond.stride(1) == 1 else cond.contiguous()
    other = cond if uncond is None else uncond if uncond.stride(1) == 1 else uncond.contiguous()
    rows, size = cond.shape
    tokens = torch.empty(rows, dtype=torch.long, device=cond.device)
    block = power_of_two(size)
    _program[(rows,)](
        cond, cond.stride(0), other, other.stride(0), waits.float().contiguous(),
        scale.float().contiguous() if isinstance(scale, Tensor) else cond, tokens,
        0.0 if isinstance(scale, Tensor) else float(scale), temperature, top_k, top_p if order == "llamagen" else 1 - top_p,
        V=size, BLOCK=block, GUIDED=uncond is not None, SCALES=isinstance(scale, Tensor),
        TOP_K=0 < top_k < size, TOP_P=0 < top_p < 1, RISING=order != "llamagen", P_FIRST=order == "transformers",
        num_warps=min(max(block // 512, 1), 16), **EXACT,
    )  # fmt: skip
    return tokens
