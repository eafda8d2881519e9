"""The Triton program of :mod:`genkit.attention.kernels.modulate`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.attention.kernels.triton_base import EXACT, constexpr, jit, power_of_two, tl

WIDEST = 16384  # channels a program can hold


@jit
def _program(
    x, x_b, x_t, x_c, scale, s_b, s_t, s_c, shift, h_b, h_t, h_c, branch, b_b, b_t, b_c, gate, g_b, g_t, g_c,
    total, out, T, offset, eps, C: constexpr, BLOCK: constexpr, LAYER: constexpr, GATED: constexpr,
):  # fmt: skip
    """One row of C channels."""
    place = tl.program_id(0).to(tl.int64)
    b, t = place // T, place % T
    c = tl.arange(0, BLOCK)
    here = c < C
    value = tl.load(x + b * x_b + t * x_t + c * x_c, here, 0.0).to(tl.float32)
    if GATED:
        value += tl.load(gate + b * g_b + t * g_t + c * g_c, here, 0.0).to(tl.float32) * tl.load(
            branch + b * b_b + t * b_t + c * b_c, here, 0.0
        ).to(tl.float32)
        tl.store(total + place * C + c, value.to(total.dtype.element_ty), here)
    if LAYER:
        value = tl.where(here, value - tl.sum(value, 0) / C, 0.0)
    value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / C + eps))
    gain = offset + tl.load(scale + b * s_b + t * s_t + c * s_c, here, 0.0).to(tl.float32)
    value = value * gain + tl.load(shift + b * h_b + t * h_t + c * h_c, here, 0.0).to(tl.float32)
    tl.store(out + place * C + c, value.to(out.dtype.element_ty), here)


def run(
    x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor | None, gate: Tensor | None,
    norm: str, offset: float, eps: float, total_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All (B, T, C), the last four views where they are the same for all places."""
    batch, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x if branch is None else torch.empty(x.shape, dtype=total_dtype, device=x.device)
    sides: list[Any] = []
    for value in (x, scale, shift, x if branch is None else branch, x if gate is None else gate):
        sides += [value, *value.stride()]
    block = power_of_two(channels)
    _program[(batch * tokens,)](
        *sides, total, out, tokens, offset, eps,
        C=channels, BLOCK=block, LAYER=norm == "layer", GATED=branch is not None,
        num_warps=min(max(block // 256, 1), 16), **EXACT,
    )  # fmt: skip
    return total, out
