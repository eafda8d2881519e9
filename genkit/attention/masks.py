"""Which keys a query may look at, as data: each backend turns it into what it does best, often into no mask at all.

Queries stand at the end of the keys: of ``q_len`` queries and ``k_len`` keys, query i stands at position ``k_len - q_len + i``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

#: ``rule(row of the batch, head, position of the query, position of the key)``, on indices that broadcast.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask as data: hashable, so that what a backend makes of it can be kept. ``a & b`` is what both let through."""

    kind: ClassVar[str]
    #: Whether equal masks always let the same through, so that what is made of one may be kept for the other.
    fixed: ClassVar[bool] = True

    @property
    def batch(self) -> int | None:
        """Rows of the batch that it is made for; None for any number."""
        return None

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        """A function of (row, head, position of the query, position of the key), all tensors of indices: True where it sees."""
        raise NotImplementedError

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        """The simplest mask that does the same at these lengths; None if every query sees every key.

        Raises:
            ValueError: the mask does not fit the lengths.
        """
        return self

    def dense(self, q_len: int, k_len: int, device: torch.device | str) -> Tensor | None:
        """As a bool tensor that broadcasts to (batch, heads, q_len, k_len), True where a query sees; None if that is everywhere.

        Raises:
            ValueError: the mask does not fit the lengths.
        """
        mask = self.reduced(q_len, k_len)
        if mask is None:
            return None
        device = torch.device(device)
        if torch.compiler.is_compiling() or not mask.fixed:
            return mask.build(q_len, k_len, device)
        return _kept(mask, q_len, k_len, device)

    def build(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        """:meth:`dense`, made anew."""
        position = torch.arange(k_len - q_len, k_len, device=device)[:, None]
        row = torch.arange(self.batch or 1, device=device)[:, None, None, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        return self.rule(q_len, k_len, device)(row, head, position, torch.arange(k_len, device=device))

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)


@lru_cache(maxsize=16)
def _kept(mask: Mask, q_len: int, k_len: int, device: torch.device) -> Tensor:
    # A tensor made under inference_mode could not be used in training later.
    with torch.inference_mode(False):
        return mask.build(q_len, k_len, device)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees its own position and those before."""

    kind = "causal"

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        return lambda b, h, q, k: k <= q

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        return None if q_len == 1 else self


@dataclass(frozen=True)
class BlockCausal(Mask):
    """A query sees its own block and those before: the scales of a next-scale model.

    Args:
        sizes: tokens of each block, from position 0 on. With a cache the keys may end before the blocks do.

    Raises:
        ValueError: a size below 1.
    """

    sizes: tuple[int, ...]
    kind = "block_causal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be tokens per block, each at least 1, such as (1, 4, 9, 16)")

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        sizes = torch.tensor(self.sizes, device=device)
        level = torch.arange(len(self.sizes), device=device).repeat_interleave(sizes, output_size=sum(self.sizes))
        return lambda b, h, q, k: level[k] <= level[q]

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        if sum(self.sizes) < k_len:
            raise ValueError(f"sizes={self.sizes} are {sum(self.sizes)} positions: too few for {k_len} keys")
        if q_len > k_len:
            raise ValueError(f"{q_len} queries at the end of {k_len} keys: BlockCausal needs as many keys as queries, or more")
        if max(self.sizes) == 1:
            return Causal().reduced(q_len, k_len)
        return None if len(self.parts(q_len, k_len)) == 1 else self

    def parts(self, q_len: int, k_len: int) -> list[tuple[int, int, int]]:
        """(begin, end, keys) of each block among the queries: queries ``begin .. end - 1`` see the first ``keys`` keys."""
        first, begin, found = k_len - q_len, 0, []
        for end in accumulate(self.sizes):
            end = min(end - first, q_len)
            if end > begin:
                found.append((begin, end, first + end))
                begin = end
        return found


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first ``length`` keys, and those up to its own position.

    Raises:
        ValueError: length below 0.
    """

    length: int
    kind = "prefix"

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"length={self.length} must be the number of keys that all see, at least 0")

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        return lambda b, h, q, k: (k < self.length) | (k <= q)

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        if self.length >= k_len or q_len == 1:
            return None
        return Causal() if self.length <= max(k_len - q_len, 0) else self


@dataclass(frozen=True)
class Tree(Mask):
    """The last ``len(parents)`` keys are nodes of a tree: a node sees all keys before the tree, its ancestors and itself.

    Queries before the tree see what stands before them.

    Args:
        parents: for each node the index of its parent, below its own; -1 for a child of what stands before the tree.

    Raises:
        ValueError: a parent that does not come before its child.
    """

    parents: tuple[int, ...]
    kind = "tree"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", tuple(self.parents))
        wrong = [i for i, parent in enumerate(self.parents) if not -1 <= parent < i]
        if wrong or not self.parents:
            raise ValueError(f"parents={self.parents}: each node's parent must come before it, or be -1, such as (-1, 0, 0, 1)")

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        base, line = k_len - len(self.parents), _ancestry(self.parents, device)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(q < base, k <= q, (k < base) | line[(q - base).clamp(min=0), (k - base).clamp(min=0)])

        return sees

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        if k_len < len(self.parents):
            raise ValueError(f"parents has {len(self.parents)} nodes, which do not fit into {k_len} keys")
        if all(parent == i - 1 for i, parent in enumerate(self.parents)):
            return Causal().reduced(q_len, k_len)
        return self


def _ancestry(parents: tuple[int, ...], device: torch.device) -> Tensor:
    """(n, n), True where the column is the row's node or an ancestor of it."""
    lines: list[list[bool]] = []
    for i, parent in enumerate(parents):
        line = lines[parent][:] if parent >= 0 else [False] * len(parents)
        line[i] = True
        lines.append(line)
    return torch.tensor(lines, device=device)


@dataclass(frozen=True)
class Sliding(Mask):
    """A query sees the last ``window`` positions up to its own.

    Raises:
        ValueError: window below 1.
    """

    window: int
    kind = "sliding"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be a number of keys, at least 1")

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        return lambda b, h, q, k: (k <= q) & (k > q - self.window)

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        return Causal().reduced(q_len, k_len) if self.window >= k_len else self


@dataclass(frozen=True)
class Padding(Mask):
    """Row b of the batch sees keys ``0 .. lengths[b] - 1``.

    Raises:
        ValueError: a length below 0.
    """

    lengths: tuple[int, ...]
    kind = "padding"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths={self.lengths} must be one number of keys for each row of the batch, at least 0")

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        lengths = torch.tensor(self.lengths, device=device)
        return lambda b, h, q, k: k < lengths[b]

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        return None if min(self.lengths) >= k_len else self


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor that broadcasts to (batch, heads, q_len, k_len), True where a query sees. Equal only to itself.

    Raises:
        ValueError: it is not bool, or has more than four dimensions.
    """

    tensor: Tensor
    kind = "dense"
    fixed = False

    def __post_init__(self) -> None:
        if self.tensor.dtype is not torch.bool or self.tensor.ndim > 4:
            raise ValueError(f"mask is {self.tensor.dtype} of shape {tuple(self.tensor.shape)}; {EXPECTED}")

    @property
    def batch(self) -> int | None:
        return self.tensor.shape[0] if self.tensor.ndim == 4 and self.tensor.shape[0] > 1 else None

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        shape = (1,) * (4 - self.tensor.ndim) + tuple(self.tensor.shape)
        whole = self.tensor.reshape(shape).to(device).expand(*shape[:2], q_len, k_len)
        last = (shape[0] - 1, shape[1] - 1)
        return lambda b, h, q, k: whole[b.clamp(max=last[0]), h.clamp(max=last[1]), q - (k_len - q_len), k]

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        shape = self.tensor.shape
        if not fits(shape, (*(shape[:-2] if len(shape) > 2 else ()), q_len, k_len)):
            raise ValueError(f"mask has shape {tuple(shape)}, for {q_len} queries and {k_len} keys; {EXPECTED}")
        return self

    def build(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        # torch's kernels know masks of two and of four axes only.
        return self.tensor.reshape((1,) * (4 - self.tensor.ndim) + tuple(self.tensor.shape)).to(device)


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape broadcasts to the other."""
    tail = wanted[len(wanted) - len(shape) :] if shape else ()
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))


EXPECTED = (
    "give a bool tensor, True where a query sees, that broadcasts to (batch, heads, q_len, k_len), or a genkit.attention.Mask"
)


@dataclass(frozen=True)
class And(Mask):
    """What both let through.

    Raises:
        ValueError: one is no mask, or they are made for batches of different sizes.
    """

    first: Mask
    second: Mask
    kind = "and"

    def __post_init__(self) -> None:
        for mask in (self.first, self.second):
            if not isinstance(mask, Mask):
                raise ValueError(f"{type(mask).__name__} is no genkit.attention.Mask: a bool tensor becomes one by Dense(tensor)")
        if self.first.batch is not None and self.second.batch is not None and self.first.batch != self.second.batch:
            raise ValueError(f"masks for {self.first.batch} and for {self.second.batch} rows cannot be combined")

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return self.first.fixed and self.second.fixed

    @property
    def batch(self) -> int | None:
        return self.second.batch if self.first.batch is None else self.first.batch

    def rule(self, q_len: int, k_len: int, device: torch.device) -> Rule:
        first, second = self.first.rule(q_len, k_len, device), self.second.rule(q_len, k_len, device)
        return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)

    def reduced(self, q_len: int, k_len: int) -> Mask | None:
        first, second = self.first.reduced(q_len, k_len), self.second.reduced(q_len, k_len)
        return And(first, second) if first is not None and second is not None else first if second is None else second

    def build(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        return self.first.build(q_len, k_len, device) & self.second.build(q_len, k_len, device)


#: Every kind of mask by its name.
KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (Causal, BlockCausal, Prefix, Tree, Sliding, Padding, Dense, And)}
