"""The updates of CFG and APG in one and two passes over memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention.kernels.launch import floating, fused, shaped, usable, working


def guidance_update(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    *,
    eta: float = 1.0,
    momentum: float = 0.0,
    threshold: float = 0.0,
    average: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``c + (w - 1)(d_perp + eta d_par)``, ``d`` the clamped running average of ``c - u`` (Sadat et al. 2024, alg. 1).

    The arithmetic of :class:`genkit.APG`: ``d = c - u + momentum average``, ``d min(1, threshold / |d|)``, then the split along
    c, per sample over all its axes. With the defaults it is :class:`genkit.CFG`, ``u + w (c - u)``, in one pass.

    Bytes moved by the Triton programs: a first pass reads c, u and the average, writes the new average, and sums |d|^2, d.c and
    |c|^2; a second reads c and d (without momentum c and u) and writes the result. Plain torch takes some eight passes, the
    split in float64: see :func:`bytes_moved`. Sums and the split are in float64 here too.

    Args:
        cond, uncond: (B, ...) of one dtype.
        scale: w, a number, or one per sample (B,).
        eta: share of the part of d along c that is kept; 1 (default): all.
        momentum: from -1 to 1 exclusive; 0 (default) is off.
        threshold: the largest norm of d; 0 (default) and inf are off.
        average: the second result of the call before, None at first.

    Returns:
        The guided prediction, and the new average, which is the one given if there is no momentum. Differentiable; with
        gradients, and off CUDA, plain torch does it.

    Raises:
        ValueError: an argument of a wrong shape or dtype, or a number out of its range.
    """
    _check(cond, uncond, scale, momentum, threshold, average)
    limit = 0.0 if math.isinf(threshold) else float(threshold)
    before = average if momentum else None

    def plain() -> tuple[Tensor, Tensor | None]:
        return _plain(cond, uncond, scale, eta, momentum, limit, average)

    if usable(cond, uncond, before) and not _wants_gradient(scale):
        weights = scale.to(cond.device) if isinstance(scale, Tensor) else scale
        return fused("guidance", plain, cond, uncond, weights, float(eta), float(momentum), limit, average)
    return plain()


def _plain(
    cond: Tensor, uncond: Tensor, scale: float | Tensor, eta: float, momentum: float, threshold: float, average: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    c, u = working(cond, uncond)
    w = scale.to(c).reshape(-1, *[1] * (c.ndim - 1)) if isinstance(scale, Tensor) else scale
    if eta == 1 and not momentum and not threshold:
        return u.lerp(c, w).to(cond.dtype), average
    delta = c - u
    if momentum:
        delta = delta if average is None else delta + momentum * average
        average = delta.to(cond.dtype)
        delta = average.to(c)  # in half precision: what the next step sees
    if threshold:
        size = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        factor = (threshold / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
        delta = delta * factor.reshape(-1, *[1] * (c.ndim - 1))
    if eta != 1:
        d, axis = delta.double().flatten(1), F.normalize(c.double().flatten(1), dim=1)
        along = (d * axis).sum(1, keepdim=True) * axis
        parallel, orthogonal = along.reshape(c.shape).to(c), (d - along).reshape(c.shape).to(c)
        delta = torch.add(orthogonal, parallel, alpha=eta) if eta else orthogonal
    guided = c + (w - 1) * delta if isinstance(w, Tensor) else torch.add(c, delta, alpha=w - 1)
    return guided.to(cond.dtype), average


def _wants_gradient(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled()


def _check(
    cond: Tensor, uncond: Tensor, scale: float | Tensor, momentum: float, threshold: float, average: Tensor | None
) -> None:
    name = "guidance_update"
    floating(name, cond=cond, uncond=uncond, average=average)
    if cond.ndim < 2:
        raise ValueError(f"{name}: cond has shape {tuple(cond.shape)}, but must have (B, ...) with at least one axis more")
    for other, value in (("uncond", uncond), ("average", average)):
        if value is not None:
            shaped(name, other, value, tuple(cond.shape))
            if value.dtype != cond.dtype:
                raise ValueError(f"{name}: {other} is {value.dtype}, but cond is {cond.dtype}; give both in one dtype")
    if isinstance(scale, Tensor):
        shaped(name, "scale", scale, (len(cond),))
    elif not math.isfinite(scale):
        raise ValueError(f"{name}: scale={scale!r} must be a finite number, or one per sample")
    if not -1 < momentum < 1:
        raise ValueError(f"{name}: momentum={momentum!r} must be strictly between -1 and 1")
    if not threshold >= 0:
        raise ValueError(f"{name}: threshold={threshold!r} must be 0 or above")


def bytes_moved(
    batch: int, size: int, *, itemsize: int = 4, eta: float = 0.0, momentum: float = 0.0, threshold: float = 0.0,
    fused: bool = True,
) -> int:  # fmt: skip
    """Bytes to and from memory of one call on samples of ``size`` values, from the second step on.

    Of the fused programs, or of plain torch operation by operation.
    """
    values, wide = batch * size, max(itemsize, 4)
    if eta == 1 and not momentum and not threshold:
        return values * 3 * itemsize
    if fused:
        return values * itemsize * (4 + 3 if momentum else 2 + 3)
    total = 3 * wide  # c - u
    total += 5 * wide if momentum else 0  # momentum average; the sum
    total += 3 * wide if threshold else 0  # norm; the product
    if eta != 1:
        total += 2 * (wide + 8) + 8 + 2 * 8  # both to float64; the norm of c; c / |c|
        total += 3 * 8 + 8 + 2 * 8 + 3 * 8 + 2 * (8 + wide)  # d axis, its sum, times axis, the difference, both back
        total += 3 * wide if eta else 0
    total += 3 * wide  # c + (w - 1) d
    total += 0 if itemsize >= 4 else 3 * (itemsize + 4)
    return values * total
