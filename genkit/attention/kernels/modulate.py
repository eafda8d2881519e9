"""AdaLN: norm without weights, gain and shift by the condition, and the gated sum before it, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention.kernels.launch import expandable, floating, fused, usable

Norm = Literal["layer", "rms"]
WIDEST = 16384  # channels that a Triton program can hold


def modulate(x: Tensor, scale: Tensor, shift: Tensor, *, norm: Norm = "layer", offset: float = 1.0, eps: float = 1e-6) -> Tensor:
    """``norm(x) (1 + scale) + shift``, computed in float32 and rounded once (Peebles & Xie 2023, sec. 3.2).

    Bytes moved: the Triton program reads x, scale and shift once and writes the result; plain torch goes over x for the norm
    (twice to read), the gain and the shift: see :func:`bytes_moved`.

    Args:
        x: (B, T, C).
        scale, shift: (B, T, C), or what can be broadcast to it: (C,), (B, 1, C).
        norm: "layer" (default) or "rms", over the channels, without weights.
        offset: what is added to scale; 0 where it holds the 1 already.
        eps: added to the variance, or to the mean square.

    Returns:
        (B, T, C) in the dtype that x, scale and shift promote to. Differentiable; with gradients, and off CUDA, plain torch
        does it.

    Raises:
        ValueError: an argument of a wrong shape or dtype, or an unknown norm.
    """
    return _run("modulate", x, None, None, scale, shift, norm, offset, eps)[1]


def gated_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *,
    norm: Norm = "layer", offset: float = 1.0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``h = x + gate branch`` and ``norm(h) (1 + scale) + shift``: the end of one layer and the start of the next.

    The norm is of h before it is rounded to its dtype. Arguments, bytes and errors as :func:`modulate`.

    Args:
        branch: (B, T, C), what attention or the MLP gave.
        gate: what it is multiplied by, (B, T, C) or what can be broadcast to it.

    Returns:
        h, in the dtype that x, branch and gate promote to, and the modulated norm.
    """
    return _run("gated_modulate", x, branch, gate, scale, shift, norm, offset, eps)


def _run(
    name: str, x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    norm: Norm, offset: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    floating(name, x=x, branch=branch, gate=gate, scale=scale, shift=shift)
    if norm not in ("layer", "rms"):
        raise ValueError(f"{name}: norm={norm!r} must be 'layer' or 'rms'")
    if x.ndim != 3:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, but must have (B, T, C)")
    shape = tuple(x.shape)
    gains, shifts = expandable(name, "scale", scale, shape), expandable(name, "shift", shift, shape)
    total = x.dtype
    if branch is not None and gate is not None:
        branch, gate = expandable(name, "branch", branch, shape), expandable(name, "gate", gate, shape)
        total = torch.promote_types(torch.promote_types(total, branch.dtype), gate.dtype)
    dtype = torch.promote_types(torch.promote_types(total, scale.dtype), shift.dtype)

    def plain() -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        h = x.to(wide) if branch is None or gate is None else torch.addcmul(x.to(wide), gate.to(wide), branch.to(wide))
        normed = F.layer_norm(h, shape[-1:], eps=eps) if norm == "layer" else F.rms_norm(h, shape[-1:], eps=eps)
        gain = scale.to(wide) + offset if offset else scale.to(wide)
        return h.to(total), torch.addcmul(shift.to(wide), normed, gain).to(dtype)

    if usable(x, branch, gate, scale, shift) and shape[-1] <= WIDEST:
        return fused("modulate", plain, x, gains, shifts, branch, gate, norm, float(offset), eps, total, dtype)
    return plain()


def bytes_moved(
    batch: int, tokens: int, channels: int, *, itemsize: int = 4, per_place: bool = False, gated: bool = False,
    fused: bool = True,
) -> int:  # fmt: skip
    """Bytes to and from memory of one call, of the fused program or of plain torch operation by operation.

    Args:
        per_place: scale, shift and gate differ from place to place, else from row to row.
        gated: :func:`gated_modulate`.
    """
    values, wide = batch * tokens * channels, max(itemsize, 4)
    given = values if per_place else batch * channels  # of each of scale, shift and gate
    if fused:
        return itemsize * (values * (4 if gated else 2) + given * (3 if gated else 2))
    casts = 0 if itemsize >= 4 else (itemsize + 4) * (values * (4 if gated else 2) + given * (3 if gated else 2))
    total = 3 * values + 2 * given + 2 * values + 2 * given  # norm (two to read); 1 + scale; their product with the shift
    total += 3 * values + given if gated else 0
    return casts + wide * total
