"""The Triton programs of :mod:`genkit.attention.kernels.guidance`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from genkit.attention.kernels.triton_base import EXACT, constexpr, jit, power_of_two, tl, triton

BLOCK = 2048  # values a program holds at once
PARTS = 256  # programs that share the sums of a sample, at most


@jit
def _difference(cond, uncond, average, at, here, momentum, MOMENTUM: constexpr):
    """``c`` and ``d = c - u + momentum average`` in float32."""
    c = tl.load(cond + at, here, 0.0).to(tl.float32)
    d = c - tl.load(uncond + at, here, 0.0).to(tl.float32)
    if MOMENTUM:
        d += momentum * tl.load(average + at, here, 0.0).to(tl.float32)
    return c, d


@jit
def _measure(
    cond, uncond, average, kept, sums, n, share, momentum,
    MOMENTUM: constexpr, KEEP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """First pass: |d|^2, d.c and |c|^2 of a share of a sample; the new average is written."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dd = tl.zeros([BLOCK], tl.float64)
    dc = tl.zeros([BLOCK], tl.float64)
    cc = tl.zeros([BLOCK], tl.float64)
    for start in range(part * share, (part + 1) * share, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < n
        c, d = _difference(cond, uncond, average, row * n + i, here, momentum, MOMENTUM)
        if KEEP:
            rounded = d.to(kept.dtype.element_ty)
            tl.store(kept + row * n + i, rounded, here)
            d = rounded.to(tl.float32)  # what the second pass reads
        c, d = c.to(tl.float64), d.to(tl.float64)
        dd += d * d
        dc += d * c
        cc += c * c
    out = sums + (row * tl.num_programs(1) + part) * 3
    tl.store(out, tl.sum(dd, 0))
    tl.store(out + 1, tl.sum(dc, 0))
    tl.store(out + 2, tl.sum(cc, 0))


@jit
def _update(
    cond, uncond, kept, sums, scale, out, n, parts, w, eta, threshold,
    KEEP: constexpr, SCALES: constexpr, CLAMP: constexpr, PROJECT: constexpr, PARTS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Second pass: ``c + (w - 1)(f d + (eta - 1) f (d.c / |c|^2) c)``, f the factor of the clamp."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, at = i < n, row * n + i
    if KEEP:
        c = tl.load(cond + at, here, 0.0).to(tl.float32)
        d = tl.load(kept + at, here, 0.0).to(tl.float64)
    else:
        c, d = _difference(cond, uncond, uncond, at, here, w, False)
        d = d.to(tl.float64)
    lane = tl.arange(0, PARTS)
    place = sums + (row * parts + lane) * 3
    dd = tl.sum(tl.load(place, lane < parts, 0.0), 0)
    dc = tl.sum(tl.load(place + 1, lane < parts, 0.0), 0)
    cc = tl.sum(tl.load(place + 2, lane < parts, 0.0), 0)
    factor = 1.0
    if CLAMP:
        size = tl.sqrt(dd)
        factor = tl.where(size > threshold, threshold / tl.where(size > threshold, size, 1.0), 1.0)
    d = d * factor
    if PROJECT:  # a cond of zeros has no direction: all of d is orthogonal to it
        along = tl.where(cc > 1e-24, dc / tl.where(cc > 1e-24, cc, 1.0), 0.0) * factor
        d = d + (eta - 1.0) * along * c.to(tl.float64)
    if SCALES:
        w = tl.load(scale + row)
    result = c.to(tl.float64) + (w - 1.0) * d
    tl.store(out + at, result.to(tl.float32).to(out.dtype.element_ty), here)


@jit
def _lerp(cond, uncond, scale, out, n, w, SCALES: constexpr, BLOCK: constexpr):
    """``u + w (c - u)``, from the end that is nearer, as torch.lerp does."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, at = i < n, row * n + i
    c, d = _difference(cond, uncond, uncond, at, here, w, False)
    u = tl.load(uncond + at, here, 0.0).to(tl.float32)
    if SCALES:
        w = tl.load(scale + row)
    result = tl.where(w < 0.5, u + w * d, c - d * (1.0 - w))
    tl.store(out + at, result.to(tl.float32).to(out.dtype.element_ty), here)


def run(
    cond: Tensor, uncond: Tensor, scale: float | Tensor, eta: float, momentum: float, threshold: float, average: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    cond, uncond = cond.contiguous(), uncond.contiguous()
    batch, n = len(cond), cond[0].numel()
    out = torch.empty_like(cond)
    scales = scale.to(torch.float32).contiguous() if isinstance(scale, Tensor) else out
    w = 0.0 if isinstance(scale, Tensor) else float(scale)
    options = {"SCALES": isinstance(scale, Tensor), "BLOCK": BLOCK, **EXACT}
    grid = (batch, triton.cdiv(n, BLOCK))
    if eta == 1 and not momentum and not threshold:
        _lerp[grid](cond, uncond, scales, out, n, w, **options)
        return out, average
    parts = min(grid[1], PARTS)
    share = triton.cdiv(grid[1], parts) * BLOCK
    sums = torch.empty(batch, parts, 3, dtype=torch.float64, device=cond.device)
    kept = torch.empty_like(cond) if momentum else None
    before, after = cond if average is None else average.contiguous(), cond if kept is None else kept
    _measure[(batch, parts)](
        cond, uncond, before, after, sums, n, share, momentum,
        MOMENTUM=average is not None and momentum != 0, KEEP=momentum != 0, BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
    _update[grid](
        cond, uncond, after, sums, scales, out, n, parts, w, eta, threshold,
        KEEP=momentum != 0, CLAMP=threshold > 0, PROJECT=eta != 1, PARTS=power_of_two(parts), **options,
    )  # fmt: skip
    return out, average if kept is None else kept
