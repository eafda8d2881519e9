"""What autoregressive networks have in common: their answer, the cache they write to, the geometry of scales."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genkit.attention import BlockCausal


class Logits(NamedTuple):
    """What a network says of n positions: logits (B, n, V) in float32, and the features (B, n, d) they come from."""

    logits: Tensor
    hidden: Tensor


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class KeyValueCache(Protocol):
    """Keys and values (B, heads, length, d) of the positions seen so far, layer by layer."""

    def update(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor, /) -> tuple[Tensor, Tensor]:
        """Store those of the positions from ``start`` (or one for each row) on; returns those of all positions up to theirs."""


class LayerCache(NamedTuple):
    """One layer of a cache, where a block of positions begins."""

    cache: KeyValueCache
    layer: int
    start: int | Tensor

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(self.layer, k, v, self.start)


class Conditioned(nn.Module):
    """A network whose ``config`` has ``num_classes``, and ``text_dim`` if it can be one of text."""

    config: Any

    @property
    def num_classes(self) -> int | None:
        """Number of labels; the label of this number is the null condition. None for text."""
        return None if getattr(self.config, "text_dim", None) is not None else self.config.num_classes

    def null(self, batch: int) -> Any:
        """The labels (B,) that stand for no class."""
        return torch.full((batch,), self.config.num_classes, device=next(self.parameters()).device)


class Scales:
    """Token maps of growing sides, one after the other: scale i is positions ``ends[i - 1] .. ends[i] - 1``.

    Attributes:
        sides, ends, length: p_i, the sums of p_j^2 up to i, and the last of them.

    Raises:
        ValueError: the sides do not grow.
    """

    def __init__(self, sides: tuple[int, ...]) -> None:
        self.sides = tuple(sides)
        if not self.sides or self.sides[0] < 1 or list(self.sides) != sorted(set(self.sides)):
            raise ValueError(f"patch_nums={self.sides}: give growing sides, such as (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)")
        self.ends = tuple(accumulate(p * p for p in self.sides))
        self.length = self.ends[-1]

    def at(self, start: int, n: int) -> tuple[int, ...]:
        """The sides of the scales that positions ``start .. start + n - 1`` are.

        Raises:
            ValueError: they are no whole scales.
        """
        ends = (0, *self.ends)
        if start not in ends or start + n not in ends or n < 1:
            raise ValueError(f"positions {start} to {start + n - 1} are no whole scales; these end before {self.ends}")
        return self.sides[ends.index(start) : ends.index(start + n)]

    def mask(self, start: int, n: int) -> BlockCausal | None:
        """What positions ``start .. start + n - 1`` see: those of their own scale and before. None if that is all."""
        return None if len(self.at(start, n)) == 1 else BlockCausal(tuple(p * p for p in self.sides))
