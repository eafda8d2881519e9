"""From two rows of logits to a token: guidance, temperature, top-k, top-p and the draw, in one pass."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genkit.attention.kernels.launch import floating, fused, shaped, usable, working

Order = Literal["llamagen", "var", "transformers"]
LARGEST = 32768  # a vocabulary whose row of logits a Triton program can hold


def sample_logits(
    logits: Tensor,
    waits: Tensor,
    *,
    uncond: Tensor | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    order: Order = "llamagen",
) -> Tensor:
    """``argmax_t p_t / e_t``, ``p = softmax(keep((u + w (c - u)) / temperature))``: a draw from p if ``e_t ~ Exp(1)``.

    That is the Gumbel-max draw ``argmax ln p - ln e`` (Gumbel 1954; Maddison et al. 2014) with numbers that are given, so that
    a sample's seed decides. What is kept is what :class:`genkit.Filters` of the same fields keeps, and without ``uncond`` the
    token is that of ``Race.draw`` for these waits. Of logits that are equal, top_k keeps all that equal the k-th, and top_p, at
    its edge, those that come first. Two things may differ in the last bit: which token is the last of top_p where a sum of
    probabilities equals it to 1e-6, and the winner of a race as close.

    Bytes moved: the Triton program reads both logits and the waits once and writes a token a row; plain torch goes over the row
    for the guidance, the temperature, top-k, the sort, its softmax and sum, the mask, and the softmax and race at the end: see
    :func:`bytes_moved`. It takes vocabularies up to 32768; plain torch does larger ones.

    Args:
        logits: (..., V), the conditional ones, or such as are guided already.
        waits: (..., V), the numbers e, above 0.
        uncond: (..., V) unconditional logits; None (default): no guidance.
        scale: w, a number, or a tensor of the shape (...).
        temperature: above 0; 0 leaves only the largest logit.
        top_k, top_p, order: as in :class:`genkit.Filters`; 0 and 1 are off.

    Returns:
        Tokens (...), int64. There is no gradient.

    Raises:
        ValueError: an argument of a wrong shape or dtype, or out of its range.
    """
    _check(logits, waits, uncond, scale, temperature, top_k, top_p, order)
    size, shape = logits.shape[-1], logits.shape[:-1]
    c, e = logits.detach().reshape(-1, size), waits.detach().reshape(-1, size).to(logits.device)
    u = None if uncond is None else uncond.detach().reshape(-1, size)
    w = scale.detach().reshape(-1).to(c.device) if isinstance(scale, Tensor) else scale

    def plain() -> Tensor:
        z = _guided(c, u, w)
        if temperature == 0:
            return z.argmax(-1)
        kept = _kept(z if temperature == 1 else z / temperature, top_k, top_p, order)
        return (kept.softmax(-1) / e.to(kept)).argmax(-1)

    if temperature and size <= LARGEST and usable(c, u, e):
        tokens = fused("sample_logits", plain, c, u, e, w, float(temperature), int(top_k), float(top_p), order)
    else:
        tokens = plain()
    return tokens.reshape(shape)


def _guided(cond: Tensor, uncond: Tensor | None, scale: float | Tensor) -> Tensor:
    if uncond is None:
        return working(cond)[0]
    c, u = working(cond, uncond)
    return u.lerp(c, scale[:, None].to(c) if isinstance(scale, Tensor) else scale)


def _kept(z: Tensor, top_k: int, top_p: float, order: Order) -> Tensor:
    """Logits (R, V), -inf where a token is left out."""
    size = z.shape[1]
    if not 0 < top_k < size and top_p in (0, 1):
        return z
    if top_p in (0, 1):
        return z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    z, place = z.sort(dim=-1, descending=True, stable=True)
    steps = ("p", "k") if order == "transformers" else ("k", "p")
    for step in steps:
        if step == "k" and 0 < top_k < size:
            z = z.masked_fill(z < z[:, top_k - 1 : top_k], -math.inf)
        if step == "p":
            z = z.masked_fill(_beyond(z, top_p, order), -math.inf)
    return torch.empty_like(z).scatter(-1, place, z)


def _beyond(falling: Tensor, top_p: float, order: Order) -> Tensor:
    """What top_p leaves out of falling logits."""
    if order == "llamagen":
        before = falling.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        return before > top_p
    out = (falling.flip(-1).softmax(-1).cumsum(-1) <= 1 - top_p).flip(-1)
    out[:, 0] = False
    return out


def _check(
    logits: Tensor, waits: Tensor, uncond: Tensor | None, scale: float | Tensor,
    temperature: float, top_k: int, top_p: float, order: Order,
) -> None:  # fmt: skip
    name = "sample_logits"
    floating(name, logits=logits, waits=waits, uncond=uncond)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: logits has shape {tuple(logits.shape)}, but must have (..., V) with V above 0")
    shape = tuple(logits.shape)
    shaped(name, "waits", waits, shape)
    if uncond is not None:
        shaped(name, "uncond", uncond, shape)
    if isinstance(scale, Tensor):
        shaped(name, "scale", scale, shape[:-1])
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{name}: temperature={temperature!r} must be 0 or above, and finite")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"{name}: top_k={top_k!r} must be an integer from 0 on")
    if not 0 <= top_p <= 1:
        raise ValueError(f"{name}: top_p={top_p!r} must be from 0 to 1")
    if order not in ("llamagen", "var", "transformers"):
        raise ValueError(f"{name}: order={order!r} must be 'llamagen', 'var' or 'transformers'")


def bytes_moved(
    rows: int, vocabulary: int, *, itemsize: int = 4, guided: bool = True, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, fused: bool = True,
) -> int:  # fmt: skip
    """Bytes to and from memory of one call, of the fused program or of plain torch operation by operation.

    A sort is counted as one pass to read values and one to write values and places; a radix sort takes several.
    """
    values = rows * vocabulary
    if fused:
        return values * (itemsize * (2 if guided else 1) + 4) + 8 * rows
    total = (itemsize + 4) * (2 if guided else 1) if itemsize < 4 else 0
    total += 12 if guided else 0
    total += 8 if temperature != 1 else 0
    if 0 < top_p < 1:
        total += 4 + 12  # the sort, and its places
        total += 5 + 9 if 0 < top_k < vocabulary else 0  # below the k-th; the mask
        total += 12 + 8 + 5 + 9  # softmax (two to read), its sum, beyond, the mask
        total += 16  # back to their places
    elif 0 < top_k < vocabulary:
        total += 4 + 5 + 9  # the k-th largest, below it, the mask
    total += 12 + 12 + 4  # softmax, over the waits, the winner
    return values * total + 8 * rows
