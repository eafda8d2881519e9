"""The one call of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention import choice
from genkit.attention.base import Request
from genkit.attention.masks import EXPECTED, Dense, Mask, fits


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    default: str | None = None,
) -> Tensor:
    """Attention, ``softmax(scale q k^T) v`` over the keys that the mask shows. A query that sees no key gets 0.

    Args:
        q: queries (B, H, Tq, D). Any number of them, at the end of the keys: the last query stands at the last key.
        k, v: keys (B, Hk, Tk, D) and values (B, Hk, Tk, Dv). Each serves H / Hk heads of the queries, one after the other.
        mask: a :class:`Mask`, or a bool tensor that broadcasts to (B, H, Tq, Tk), True where a query sees. Default: it sees all.
        scale: default ``1 / sqrt(D)``.
        backend: a name of :data:`BACKENDS`, or "auto". Default: that of :func:`use_attention`, else of ``default``, else of the
            environment variable ``GENKIT_ATTENTION``, else "auto", the best that can do the call.
        default: what the calling network asks for, see :func:`set_attention`.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a mask that does not fit them.
        Unavailable: a ValueError, the backend that is asked for cannot be used here, or not for this call.
    """
    qs, ks, vs = q.shape, k.shape, v.shape
    if len(qs) != 4 or len(ks) != 4 or len(vs) != 4:
        raise ValueError(_misfit(q, k, v))
    batch, heads, q_len, head_dim = qs
    kv_batch, kv_heads, k_len, key_dim = ks
    if kv_batch != batch or key_dim != head_dim or vs[:3] != ks[:3] or not kv_heads or heads % kv_heads:
        raise ValueError(_misfit(q, k, v))
    if (q.dtype is not k.dtype or k.dtype is not v.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give all three in one dtype")
    if mask is not None and not isinstance(mask, Tensor):
        if not isinstance(mask, Mask):
            raise ValueError(f"mask is {mask!r}; {EXPECTED}")
        if mask.batch not in (None, batch):
            raise ValueError(f"mask is for {mask.batch} rows, but q has {batch}")
        mask = mask.reduced(q_len, k_len)
    name = choice.asked(backend, default)
    if name == choice.AUTO and (mask is None or isinstance(mask, Tensor)):  # what a step of decoding does: the shortest way
        if mask is not None:
            mask = _checked(mask, (batch, heads, q_len, k_len))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != kv_heads)
    if isinstance(mask, Tensor):
        mask = Dense(_checked(mask, (batch, heads, q_len, k_len)))
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    request = Request(q.device.type, q.dtype, batch, heads, kv_heads, q_len, k_len, head_dim, vs[3], mask, grad)
    chosen = choice.best(request) if name == choice.AUTO else choice.named(name, request)
    return chosen(q, k, v, mask, scale)


def _checked(mask: Tensor, wanted: tuple[int, int, int, int]) -> Tensor:
    """With two or four axes, which is what torch's kernels know."""
    shape = mask.shape
    if mask.dtype is not torch.bool or not fits(shape, wanted):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(shape)}, for {wanted}; {EXPECTED}")
    return mask if len(shape) in (2, 4) else mask.reshape((1,) * (4 - len(shape)) + tuple(shape))


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    return (
        f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together: they must be (B, H, Tq, D), "
        "(B, Hk, Tk, D) and (B, Hk, Tk, Dv), H a multiple of Hk"
    )
