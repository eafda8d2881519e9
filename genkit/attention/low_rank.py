"""Attention in time linear in the length, where scores are bounded: exp by its Taylor polynomial, as a product of features.

``exp(s) ~ p_g(s) = sum_{j <= g} s^j / j!`` and ``p_g(x . y) = phi(x) . phi(y)`` with one feature for each monomial of degree up
to g in d variables, C(d + g, g) of them. So ``sum_j p_g(s_ij) v_j = phi(q_i) . sum_j phi(k_j) v_j``: no matrix of scores.

It pays where the features are fewer than the keys (:func:`break_even`), and is accurate where scores are small
(:func:`error_bound`). Where the bound exceeds the tolerance, :func:`low_rank_attention` computes exactly.

Ke et al. 2025, "On Computational Limits and Provably Efficient Criteria of Visual Autoregressive Models" (arXiv 2501.04377),
after Alman and Song 2023, "Fast Attention Requires Bounded Entries".
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Bounded(NamedTuple):
    """How large entries and scores are.

    Attributes:
        entry: R = max(|q|, |k|) over all entries.
        score: max |s|, s = scale q . k; takes time quadratic in the length, and is for reports alone.
        limit: ``scale max|q_i| max|k_j|`` (norms), an upper bound on it in linear time.
        square: the largest mean of s^2 over the keys of a query, ``max_i scale^2 q_i^T (mean_j k_j k_j^T) q_i``, in linear time.
    """

    entry: float
    score: float
    limit: float
    square: float


def bounded_entries(q: Tensor, k: Tensor, scale: float | None = None) -> Bounded:
    """Probe queries (B, H, Tq, D) and keys (B, Hk, Tk, D) of a layer: can its attention be approximated?

    Args:
        scale: of the scores; None is 1 / sqrt(D).

    Raises:
        ValueError: other shapes.
    """
    _check_shapes(q, k=k)
    scale, k = _scale(q, scale), _per_query_head(k, q)
    entry = max(float(q.abs().max()), float(k.abs().max()))
    blocks = (float((part @ k.mT).abs().max()) for part in q.split(256, -2))  # not all scores at a time
    return Bounded(entry, abs(scale) * max(blocks), *_limits(q, k, scale))


def _limits(q: Tensor, k: Tensor, scale: float) -> tuple[float, float]:
    """``limit`` and ``square`` of :class:`Bounded`; k has as many heads as q."""
    q, k = q.detach(), k.detach()
    limit = torch.linalg.vector_norm(q, dim=-1).amax() * torch.linalg.vector_norm(k, dim=-1).amax()
    square = (q @ (k.mT @ k / k.shape[-2]) * q).sum(-1).amax()
    return abs(scale) * float(limit), scale**2 * float(square)


def error_bound(score: float, degree: int, spread: float = 1.0, square: float | None = None) -> float:
    """How far any entry of the approximated output can be from the exact one; inf where there is no bound.

    The Taylor remainder has ``|exp(s) - p_g(s)| <= c s^2`` for ``|s| <= b``, ``c = sum_{j > g} b^j / j! / b^2``. Scores of mean 0
    have a mean exponential of at least 1. So the remainders of a row are at most the share ``e = c mean_j s_ij^2`` of its sum of
    weights, and its output moves by at most ``2 e / (1 - e) spread``.

    Args:
        score: b, the largest |score|, from 0.
        degree: g, 1 or more.
        spread: half the largest difference between two values in one coordinate; exact arithmetic is assumed.
        square: the largest mean of squared scores over the keys of a query; None is b^2, which it cannot exceed.

    Raises:
        ValueError: a negative score, or degree below 1.
    """
    _check_degree(degree)
    if score < 0:
        raise ValueError(f"score={score} is the largest of absolute values: give 0 or more")
    if not score <= 50:  # or NaN, of a network that diverged
        return math.inf
    tail = math.fsum(score ** (j - 2) / math.factorial(j) for j in range(degree + 1, degree + 160))
    share = tail * (score**2 if square is None else square)
    return 2 * share / (1 - share) * spread if share < 1 else math.inf


def rank(d: int, degree: int) -> int:
    """C(d + g, g), the number of features for heads of width d. Raises ValueError for a degree below 1."""
    _check_degree(degree)
    return math.comb(d + degree, degree)


def break_even(d: int, degree: int) -> float:
    """Length from which on fewer multiplications are needed than for exact attention: ``C(d + g, g) (2 d + 2 + g - 1) / (2 d)``.

    Per head: exact ``2 n^2 d``; low rank ``2 n r (d + 1)`` and ``2 n r (g - 1)`` for the features. The softmax's exponentials are
    not counted, nor that large matrix products run at a higher rate: measure before use.
    """
    return rank(d, degree) * (2 * (d + 1) + 2 * (degree - 1)) / (2 * d)


@lru_cache(maxsize=16)
def _monomials(d: int, degree: int) -> tuple[Tensor, Tensor]:
    """Factors (g, r) of each monomial, 0 standing for 1 and i for x_i, and 1 / sqrt(alpha!) (r,) for its exponents alpha."""
    factors = list(combinations_with_replacement(range(d + 1), degree))
    weights = [math.prod(math.factorial(n) for i, n in Counter(f).items() if i) ** -0.5 for f in factors]
    return torch.tensor(factors).T.contiguous(), torch.tensor(weights, dtype=torch.float64)


def features(x: Tensor, degree: int) -> Tensor:
    """phi(x), (..., C(d + g, g)) for x (..., d), with ``phi(x) . phi(y) = sum_{j <= g} (x . y)^j / j!``."""
    one = F.pad(x, (1, 0), value=1.0)
    if degree == 1:
        return one
    factors, weights = _monomials(x.shape[-1], degree)
    out = one[..., factors[0].to(x.device)]
    for row in factors[1:]:
        out = out * one[..., row.to(x.device)]
    return out * weights.to(out)


def low_rank_attention(
    q: Tensor, k: Tensor, v: Tensor, *, degree: int = 1, scale: float | None = None, tolerance: float = 1e-2
) -> Tensor:
    """``phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1)``, or exact attention where the a-priori bound exceeds the tolerance.

    The mean key is subtracted first, which changes no softmax and gives scores of mean 0. The bound is :func:`error_bound` of
    what :func:`bounded_entries` finds then in linear time (``limit`` and ``square``), the largest over the whole call.

    Args:
        q: (B, H, Tq, D). Half precision is computed in float32.
        k, v: (B, Hk, Tk, D), H a multiple of Hk.
        degree: g, 1 or more; there are C(D + g, g) features.
        scale: None is 1 / sqrt(D).
        tolerance: the largest error of an entry that is accepted, in units of v; 0 is always exact, inf never.

    Raises:
        ValueError: other shapes, degree below 1, or a negative tolerance.
    """
    _check_degree(degree)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is the largest error that is accepted: give 0 or more")
    _check_shapes(q, k=k, v=v)
    scale, dtype = _scale(q, scale), q.dtype
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    wide = torch.promote_types(dtype, torch.float32)
    queries, keys = q.to(wide), k.to(wide) - k.to(wide).mean(-2, keepdim=True)
    limit, square = _limits(queries, keys, scale)
    spread = float((v.amax(-2) - v.amin(-2)).max().detach()) / 2
    if not error_bound(limit, degree, spread, square) <= tolerance:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    state = features(keys, degree).mT @ F.pad(v.to(wide), (0, 1), value=1.0)
    out = features(queries * scale, degree) @ state
    return (out[..., :-1] / out[..., -1:]).to(dtype)


def _check_degree(degree: int) -> None:
    if not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree={degree!r} is that of a polynomial: give a whole number from 1 on")


def _check_shapes(q: Tensor, **others: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has the shape {tuple(q.shape)}: give (B, H, T, D)")
    for name, x in others.items():
        fits = x.ndim == 4 and x.shape[0] == q.shape[0] and x.shape[1] and not q.shape[1] % x.shape[1]
        if not fits or (name == "k" and x.shape[3] != q.shape[3]) or x.shape[2] != next(iter(others.values())).shape[2]:
            width = q.shape[3] if name == "k" else "Dv"
            raise ValueError(
                f"{name} has the shape {tuple(x.shape)}: beside q of {tuple(q.shape)} give ({q.shape[0]}, Hk, Tk, {width}), "
                "with H a multiple of Hk and Tk the same for k and v"
            )


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """x (B, Hk, ...) with every head as often as there are query heads for it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale
