"""The low-rank approximation of attention for bounded entries; see :mod:`genkit.attention.low_rank`."""

from __future__ import annotations

from torch import Tensor

from genkit.attention.base import BACKENDS, AttentionBackend, register_backend
from genkit.attention.low_rank import low_rank_attention
from genkit.attention.masks import Mask


class LowRank(AttentionBackend):
    """Taylor features of exp; exact attention where their error bound exceeds the tolerance, and under any mask.

    Args:
        degree: of the Taylor polynomial; C(D + degree, degree) features.
        tolerance: the largest error of an entry of the output that is accepted, in units of v.
        name: for :func:`register_backend`, to have it with other settings beside the default one.
    """

    note = "Taylor features for bounded entries; exact where the error bound is too large. Reads values back: does not trace"
    exact = False

    def __init__(self, degree: int = 1, tolerance: float = 1e-2, name: str = "low_rank") -> None:
        self.degree, self.tolerance, self.name = degree, tolerance, name

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        if mask is not None:
            return BACKENDS["sdpa"](q, k, v, mask, scale)
        return low_rank_attention(q, k, v, degree=self.degree, scale=scale, tolerance=self.tolerance)


register_backend(LowRank())
