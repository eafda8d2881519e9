"""Calls of attention to try, and what each kind of mask means, written down once more, pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from genkit.attention import And, BlockCausal, Causal, Dense, Mask, Padding, Prefix, Sliding, Tree

ATOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sees(mask: Mask | None, row: int, head: int, i: int, q_len: int, key: int, k_len: int) -> bool:
    """Whether query i sees a key."""
    at = k_len - q_len + i
    if mask is None:
        return True
    if isinstance(mask, Causal):
        return key <= at
    if isinstance(mask, BlockCausal):
        block = list(itertools.chain.from_iterable([n] * size for n, size in enumerate(mask.sizes)))
        return block[key] <= block[at]
    if isinstance(mask, Prefix):
        return key < mask.length or key <= at
    if isinstance(mask, Sliding):
        return at - mask.window < key <= at
    if isinstance(mask, Padding):
        return key < mask.lengths[row]
    if isinstance(mask, Tree):
        first = k_len - len(mask.parents)
        if at < first:
            return key <= at
        node = at - first
        while node >= 0:
            if key == first + node:
                return True
            node = mask.parents[node]
        return key < first
    if isinstance(mask, Dense):
        place = (row, head, i, key)[4 - mask.tensor.ndim :]
        return bool(mask.tensor[tuple(0 if n == 1 else at for at, n in zip(place, mask.tensor.shape, strict=True))])
    assert isinstance(mask, And)
    both = (sees(part, row, head, i, q_len, key, k_len) for part in (mask.first, mask.second))
    return all(both)


@dataclass(frozen=True)
class Case:
    """One call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    scale: float | None = None

    def expected(self) -> Tensor:
        """In float64, one query at a time, over the keys that it sees."""
        (batch, heads, q_len, d), (_, kv_heads, k_len, _) = self.q.shape, self.k.shape
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
        for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
            look = [key for key in range(k_len) if sees(self.mask, b, h, i, q_len, key, k_len)]
            if look:
                g = h // (heads // kv_heads)
                weights = (k[b, g, look] @ q[b, h, i] * (d**-0.5 if self.scale is None else self.scale)).softmax(0)
                out[b, h, i] = weights @ v[b, g, look]
        return out


def deviation(found: Tensor, case: Case) -> float:
    return float((found.double() - case.expected()).abs().max())


def masks(kind: str, batch: int, heads: int, q_len: int, k_len: int) -> st.SearchStrategy[Any]:
    """Masks of a kind that fit these lengths, rows that see nothing among them where the kind has such."""
    some = st.integers(1, k_len + 2)
    if kind == "block_causal":
        return st.lists(st.integers(1, 7), min_size=k_len, max_size=k_len).map(lambda s: BlockCausal(tuple(s)))
    if kind == "tree":
        nodes = st.integers(1, k_len)
        return nodes.flatmap(lambda n: st.tuples(*[st.integers(-1, i - 1) for i in range(n)])).map(Tree)
    if kind == "padding":
        return st.tuples(*[st.integers(0, k_len + 1)] * batch).map(Padding)
    if kind == "dense":
        shapes = [(q_len, k_len), (1, k_len), (batch, 1, q_len, k_len), (batch, heads, q_len, k_len), (batch, 1, 1, k_len)]
        drawn = st.tuples(st.sampled_from(shapes), st.integers(0, 99), st.floats(0, 1))
        return drawn.map(lambda t: Dense(torch.rand(t[0], generator=torch.Generator().manual_seed(t[1])) < t[2]))
    if kind == "and":
        first, second = (st.sampled_from(names) for names in (("causal", "sliding", "dense"), ("padding", "prefix")))
        parts = st.tuples(first, second).flatmap(lambda t: st.tuples(*(masks(n, batch, heads, q_len, k_len) for n in t)))
        return parts.map(lambda t: t[0] & t[1])
    return {"causal": st.just(Causal()), "prefix": some.map(Prefix), "sliding": some.map(Sliding), "none": st.none()}[kind]


@st.composite
def cases(draw: st.DrawFn, kind: str, longest: int = 20, dtypes: tuple[torch.dtype, ...] = tuple(ATOL)) -> Case:
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    k_len = draw(st.integers(1, longest))
    # More queries than keys: those before the first key see nothing.
    q_len = draw(st.integers(1, k_len + 3 if kind in ("causal", "sliding") else k_len))
    d, dtype, heads = draw(st.sampled_from([1, 8, 16, 24])), draw(st.sampled_from(dtypes)), kv_heads * group
    scale = draw(st.sampled_from([None, 0.3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = ((batch, heads, q_len, d), (batch, kv_heads, k_len, d), (batch, kv_heads, k_len, d))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return Case(q, k, v, draw(masks(kind, batch, heads, q_len, k_len)), scale)


def fixed(kind: str, q_len: int = 9, k_len: int = 12, dtype: torch.dtype = torch.float32) -> Case:
    """A call in which the mask matters."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=generator).to(dtype) for heads, n in ((4, q_len), (2, k_len), (2, k_len)))
    look = torch.rand(2, 4, q_len, k_len, generator=generator) < 0.5
    look[:, :, 1] = False
    third = k_len // 3
    found: dict[str, Mask | None] = {
        "none": None,
        "causal": Causal(),
        "block_causal": BlockCausal((1, third, k_len - third - 1)),
        "prefix": Prefix(k_len - q_len + 3),
        "tree": Tree((-1, 0, 0, 1, 1, -1)),
        "sliding": Sliding(4),
        "padding": Padding((5, 0)),
        "dense": Dense(look),
        "and": Causal() & Padding((7, 3)),
    }
    return Case(q, k, v, found[kind])
