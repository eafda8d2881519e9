"""Trees of drafted tokens: their shape, who may look at whom, and how they grow.

Node 0 is the root: the last token drawn, which the target has not seen yet. Parents come before their children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Expand = Callable[[Tensor, Tensor], Tensor]
"""``expand(tokens (B, m), parents (B, m)) -> logits (B, m, V)`` after m more nodes of one level. Parents are numbers of nodes
expanded before, counted from 0 over all calls; -1 is the root."""

Sample = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``sample(logits (B, m, V), count)`` -> tokens (B, m, count) drawn without replacement, and their distribution (B, m, V)."""


class TokenTree(NamedTuple):
    """Drafted continuations of a batch.

    ``parents`` is -1 at the root, and at places where a row has no node. ``q[b, i]`` is the distribution from which the children
    of node i were drawn, one after the other and without replacement; None where the tokens are no random draws.
    """

    tokens: Tensor  # (B, n)
    parents: Tensor  # (B, n)
    q: Tensor | None = None  # (B, n, V)


def ancestors(parents: Tensor) -> Tensor:
    """(B, n, n), True where node i is j or descends from j."""
    n = parents.shape[1]
    reach = torch.eye(n, device=parents.device).expand(len(parents), n, n).clone()
    rows, nodes = (parents >= 0).nonzero(as_tuple=True)
    reach[rows, nodes, parents[rows, nodes]] = 1
    for _ in range(max(n - 1, 1).bit_length()):  # after i rounds: 2^i generations
        reach = (reach @ reach).clamp_max(1)
    return reach > 0


def depths(parents: Tensor) -> Tensor:
    """(B, n): 0 at the root; 0 too where there is no node."""
    return ancestors(parents).sum(-1) - 1


def children(parents: Tensor) -> Tensor:
    """(B, n, w): the children of every node in order, filled up with -1."""
    same = (parents[:, :, None] == parents[:, None, :]) & (parents >= 0)[:, :, None]
    rank = same.tril(-1).sum(-1)
    rows, nodes = (parents >= 0).nonzero(as_tuple=True)
    width = int(rank.max()) + 1
    out = parents.new_full((*parents.shape, width), -1)
    out[rows, parents[rows, nodes], rank[rows, nodes]] = nodes
    return out


def paths(parents: Tensor) -> Tensor:
    """(B, n, levels + 1): the nodes from the root to each node, filled up with -1."""
    reach = ancestors(parents)
    depth = reach.sum(-1) - 1
    rows, nodes, above = reach.nonzero(as_tuple=True)
    out = parents.new_full((*parents.shape, int(depth.max()) + 1), -1)
    out[rows, nodes, depth[rows, above]] = above
    return out


def leaves(parents: Tensor) -> Tensor:
    """(B, n), True at nodes without children; the root is one if it stands alone."""
    there = parents >= 0
    there[:, 0] = True
    rows, nodes = (parents >= 0).nonzero(as_tuple=True)
    there[rows, parents[rows, nodes]] = False
    return there


def attention_mask(look: Tensor, lengths: Tensor) -> Tensor:
    """The mask of nodes that stand behind sequences of different lengths.

    Args:
        look: (B, n, total), which of the ``total`` nodes behind the sequence the last n of them see.
        lengths: (B,) of the sequences, all of which is seen.

    Returns:
        (B, 1, n, max(lengths) + total) bool.
    """
    batch, n, total = look.shape
    lengths = lengths.to(look.device)
    column = torch.arange(int(lengths.max()) + total, device=look.device) - lengths[:, None]  # (B, end): number of the node
    inside = (column >= 0) & (column < total)
    seen = look.gather(2, column.clamp(0, total - 1)[:, None].expand(batch, n, -1)) & inside[:, None]
    return (seen | (column < 0)[:, None])[:, None]


class Expansion:
    """Who sees whom among the nodes a drafter has expanded, level by level."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.look = torch.zeros(batch, 0, 0, dtype=torch.bool, device=device)

    @property
    def count(self) -> int:
        """Nodes so far."""
        return self.look.shape[1]

    def add(self, parents: Tensor) -> Tensor:
        """More nodes, given their parents (B, m), -1 for the root. Returns what they see, (B, m, count)."""
        (batch, m), old = parents.shape, self.count
        new = torch.eye(m, dtype=torch.bool, device=parents.device).expand(batch, m, m)
        before = self.look.new_zeros(batch, m, old)
        if old:
            inherited = self.look.gather(1, parents.clamp_min(0)[..., None].expand(-1, -1, old))
            before = inherited & (parents >= 0)[..., None]
        rows = torch.cat([before, new], 2)
        self.look = torch.cat([torch.nn.functional.pad(self.look, (0, m)), rows], 1)
        return rows


class Shape(Protocol):
    """How a tree grows from a drafter."""

    @property
    def levels(self) -> int:
        """The longest path, without the root."""

    @property
    def nodes(self) -> int:
        """The most nodes it has, the root included."""

    @property
    def expanded(self) -> int:
        """The most nodes it expands, the root not included: so much room a drafter needs."""

    def grow(self, root: Tensor, first: Tensor, expand: Expand, sample: Sample | None) -> TokenTree:
        """A tree on the tokens ``root`` (B,), whose drafted logits are ``first`` (B, V)."""


@dataclass(frozen=True)
class DynamicTree:
    """The most probable continuations: a beam of ``width`` is expanded ``levels - 1`` times, and the best nodes of all are kept.

    A node counts with the product of the drafted probabilities along its path (EAGLE-2, Li et al. 2024, section 4). Its tokens
    are no random draws.

    Args:
        nodes: of the tree, the root included, from 2.
        levels: of drafted tokens, from 1.
        width: of the beam, and children tried of each of its nodes, from 1.

    Raises:
        ValueError: a number is too small.
    """

    nodes: int = 59
    levels: int = 5
    width: int = 10

    def __post_init__(self) -> None:
        if self.nodes < 2 or self.levels < 1 or self.width < 1:
            raise ValueError(f"{self!r}: give nodes from 2, levels and width from 1")

    @property
    def expanded(self) -> int:
        return self.width * (self.levels - 1)

    def grow(self, root: Tensor, first: Tensor, expand: Expand, sample: Sample | None = None) -> TokenTree:
        width = min(self.width, first.shape[-1])
        score, token = first.log_softmax(-1).topk(width)
        numbers = torch.arange(1, width + 1, device=root.device).expand(len(root), -1)  # of the beam, among all candidates
        above = torch.full_like(numbers, -1)  # its parents, among the nodes expanded
        tokens, parents, scores = [root[:, None], token], [torch.full_like(root[:, None], -1), torch.zeros_like(token)], [score]
        for level in range(1, self.levels):
            log_p, next_token = expand(token, above).log_softmax(-1).topk(width)
            total = (log_p + score[..., None]).flatten(1)
            tokens.append(next_token.flatten(1))
            parents.append(numbers.repeat_interleave(width, 1))
            scores.append(total)
            score, best = total.topk(width)
            token, numbers = tokens[-1].gather(1, best), best + 1 + width + (level - 1) * width * width
            above = best // width + (level - 1) * width
        return _best(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), self.nodes - 1)


def _best(tokens: Tensor, parents: Tensor, scores: Tensor, count: int) -> TokenTree:
    """The root and the best ``count`` nodes, in their order. No child is better than its parent, and the sort is stable."""
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values + 1
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)
    place = torch.full_like(tokens, -1).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    above = parents.gather(1, kept)
    return TokenTree(tokens.gather(1, kept), torch.where(above < 0, above, place.gather(1, above.clamp_min(0))))


@dataclass(frozen=True)
class StaticTree:
    """A tree of one shape: node ``(0, 2)`` is the third child of the first child of the root.

    With a temperature, siblings are drawn from the drafter without replacement (LANTERN++, Park et al. 2025); without one they
    are its most probable tokens.

    Args:
        choices: the nodes, in any order; a node's parent and its elder siblings must be there too.

    Raises:
        ValueError: they are not, or a node stands twice.
    """

    choices: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted((tuple(c) for c in self.choices), key=lambda c: (len(c), c)))
        for c in ordered:
            needed = c[:-1] if c[-1:] == (0,) else (*c[:-1], c[-1] - 1) if c else c
            if not c or (needed and needed not in ordered) or ordered.count(c) > 1:
                raise ValueError(f"choices: {c} stands twice, or without its parent or elder sibling {needed}")
        object.__setattr__(self, "choices", ordered)

    @classmethod
    def chain(cls, length: int) -> StaticTree:
        """One continuation of ``length`` tokens."""
        return cls(tuple((0,) * i for i in range(1, length + 1)))

    @property
    def levels(self) -> int:
        return len(self.choices[-1])

    @property
    def nodes(self) -> int:
        return len(self.choices) + 1

    @property
    def expanded(self) -> int:
        return len({c[:-1] for c in self.choices if len(c) > 1})

    def parents(self) -> list[int]:
        """The parent of each node, -1 for the root."""
        number = {c: i for i, c in enumerate(((), *self.choices))}
        return [-1, *(number[c[:-1]] for c in self.choices)]

    def grow(self, root: Tensor, first: Tensor, expand: Expand, sample: Sample | None = None) -> TokenTree:
        everything: tuple[tuple[int, ...], ...] = ((), *self.choices)
        tokens = root[:, None].repeat(1, self.nodes)
        parents = torch.tensor(self.parents(), device=root.device).repeat(len(root), 1)
        q = None if sample is None else first.new_zeros(len(root), self.nodes, first.shape[-1])
        expanded: list[tuple[int, ...]] = []
        for level in range(self.levels):
            inner = sorted({c[:-1] for c in self.choices if len(c) == level + 1})
            at = [everything.index(c) for c in inner]
            if level:
                above = torch.tensor([expanded.index(c[:-1]) if level > 1 else -1 for c in inner], device=root.device)
                logits = expand(tokens[:, at], above.expand(len(root), -1))
                expanded += inner
            else:
                logits = first[:, None]
            count = 1 + max(c[-1] for c in self.choices if len(c) == level + 1)
            drawn, law = (logits.topk(count).indices, None) if sample is None else sample(logits, count)
            for j, c in enumerate(everything):
                if len(c) == level + 1:
                    tokens[:, j] = drawn[:, inner.index(c[:-1]), c[-1]]
            if q is not None and law is not None:
                q[:, at] = law
        return TokenTree(tokens, parents, None) if q is None else TokenTree(tokens, _possible(tokens, parents, q), q)


def _possible(tokens: Tensor, parents: Tensor, q: Tensor) -> Tensor:
    """The parents without the nodes that were drawn with probability zero, for want of others, and what hangs on them."""
    above = parents.clamp_min(0)
    mass = q.gather(1, above[..., None].expand(-1, -1, q.shape[-1])).gather(2, tokens[..., None])[..., 0]
    gone = (mass <= 0) & (parents >= 0)
    return parents.masked_fill((ancestors(parents) & gone[:, None]).any(-1), -1)
