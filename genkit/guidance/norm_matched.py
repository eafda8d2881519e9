"""Guidance with the norm of the conditional prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import check_number
from genkit.guidance.measures import ratio
from genkit.guidance.postprocess import _PostProcess
from genkit.noise import Space


@dataclass(frozen=True)
class NormMatched(_PostProcess):
    """``g limit |c| / |g|``, with ``cap`` only where that shrinks g; g is ``inner``, c the conditional prediction.

    The rule of Qwen-Image and Lumina 2 is ``axis=-1`` (per token); of Z-Image ``axis=None, cap=True`` (per sample); of ComfyUI's
    CFGNorm ``axis=1, cap=True, space="x0"`` (per pixel); of EP-CFG, which matches energies, ``axis=None``. Nothing is changed
    where ``inner`` does not guide, and where g is 0 it stays 0.

    Args:
        inner: any guidance that does not ask for ``refine``.
        axis: what a norm runs over. None: all values of a sample; an integer: that axis of the tensor, batch being 0. Tokens
            (B, L, C) have their channels last, axis -1; images and videos (B, C, ...) on axis 1.
        cap: never enlarge g.
        limit: k, above 0, in units of |c|.
        space: where the norms are taken: ``"flow"``, the output of the models named, ``"v"``, ``"eps"`` or ``"x0"``.

    Raises:
        ValueError: an argument outside its range, an unknown space, or an inner guidance that asks for ``refine``; in a run, an
            axis that samples do not have.
    """

    axis: int | None = None
    cap: bool = False
    limit: float = 1.0
    space: Space = field(default="flow", kw_only=True)  # type: ignore[misc]
    examples: ClassVar[tuple[str, ...]] = (
        "NormMatched(CFG(4.0), axis=-2)",
        "NormMatched(CFG(4.0), axis=1, cap=True, space='x0')",
        "NormMatched(CFG(4.0), cap=True, limit=0.9)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis == 0):
            raise ValueError(f"NormMatched: axis={self.axis!r} must be None or an integer other than 0, the batch")
        if not isinstance(self.cap, bool):
            raise ValueError(f"NormMatched: cap={self.cap!r} must be True or False")
        check_number(self, "limit", 0.0, math.inf, inside=True)

    def process(self, guided: Tensor, cond: Tensor) -> Tensor:
        n = guided.ndim
        if self.axis is not None and (not -n < self.axis < n):
            raise ValueError(
                f"NormMatched: axis={self.axis} is no axis of a sample in x of shape {tuple(guided.shape)}; "
                f"use None, 1 to {n - 1}, or -1 to {1 - n}"
            )
        axes = tuple(range(1, n)) if self.axis is None else (self.axis,)
        norm_g, norm_c = (torch.linalg.vector_norm(p, dim=axes, keepdim=True) for p in (guided, cond))
        factor = ratio(self.limit * norm_c, norm_g)
        return guided * (factor.clamp_max(1) if self.cap else factor)
