"""Masks as data: what they let through, what they reduce to, what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genkit.attention import And, BlockCausal, Causal, Dense, Mask, Padding, Prefix, Sliding, Tree, attention
from genkit.attention.masks import KINDS
from tests.attention_core.cases import Case, cases, fixed, sees

CPU = torch.device("cpu")


def pairs(case: Case) -> Tensor:
    (batch, heads, q_len, _), k_len = case.q.shape, case.k.shape[2]
    look = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    for b, h, i, key in itertools.product(*map(range, look.shape)):
        look[b, h, i, key] = sees(case.mask, b, h, i, q_len, key, k_len)
    return look


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_dense_and_rule_are_the_definition(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, longest=9, dtypes=(torch.float32,)))
    assert case.mask is not None
    q_len, k_len = case.q.shape[2], case.k.shape[2]
    wanted = pairs(case)
    found = case.mask.dense(q_len, k_len, CPU)
    assert torch.equal(torch.ones_like(wanted) if found is None else found.expand_as(wanted), wanted)
    b, h, i, key = torch.meshgrid(*map(torch.arange, wanted.shape), indexing="ij")
    assert torch.equal(case.mask.rule(q_len, k_len, CPU)(b, h, i + k_len - q_len, key).expand_as(wanted), wanted)


@pytest.mark.parametrize(
    ("mask", "q_len", "k_len", "simplest"),
    [
        (Causal(), 1, 9, None),
        (Causal(), 2, 9, Causal()),
        (BlockCausal((1, 4, 9)), 9, 14, None),  # the last scale, with a cache
        (BlockCausal((1, 4, 9)), 4, 5, None),  # the one before: the keys end before the blocks
        (BlockCausal((1, 4, 9)), 10, 14, BlockCausal((1, 4, 9))),
        (BlockCausal((1, 1, 1)), 3, 3, Causal()),
        (BlockCausal((5,)), 5, 5, None),
        (Prefix(9), 4, 9, None),
        (Prefix(5), 1, 9, None),
        (Prefix(5), 4, 9, Causal()),
        (Prefix(6), 4, 9, Prefix(6)),
        (Prefix(0), 9, 9, Causal()),
        (Tree((-1, 0, 1)), 3, 9, Causal()),
        (Tree((-1,)), 1, 9, None),
        (Tree((-1, -1)), 2, 9, Tree((-1, -1))),
        (Sliding(9), 4, 9, Causal()),
        (Sliding(3), 1, 9, Sliding(3)),
        (Padding((9, 10)), 4, 9, None),
        (Padding((9, 8)), 4, 9, Padding((9, 8))),
        (Causal() & Padding((9, 9)), 4, 9, Causal()),
        (Prefix(9) & Padding((9, 8)), 4, 9, Padding((9, 8))),
        (Prefix(9) & Causal(), 1, 9, None),
    ],
)
def test_the_simplest_mask(mask: Mask, q_len: int, k_len: int, simplest: Mask | None) -> None:
    assert mask.reduced(q_len, k_len) == simplest


def test_blocks_are_queries_and_the_keys_they_see() -> None:
    assert BlockCausal((1, 4, 9)).parts(14, 14) == [(0, 1, 1), (1, 5, 5), (5, 14, 14)]
    assert BlockCausal((1, 4, 9)).parts(11, 14) == [(0, 2, 5), (2, 11, 14)]
    assert BlockCausal((1, 4, 9)).parts(4, 7) == [(0, 2, 5), (2, 4, 7)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BlockCausal((1, 0)), r"sizes=\(1, 0\)"),
        (lambda: Prefix(-1), "length=-1"),
        (lambda: Tree((0,)), r"parents=\(0,\)"),
        (lambda: Tree((-1, 2, 0)), "parents"),
        (lambda: Sliding(0), "window=0"),
        (lambda: Padding((3, -1)), r"lengths=\(3, -1\)"),
        (lambda: Dense(torch.zeros(2, 2)), "torch.float32.*bool"),
        (lambda: Padding((1, 2)) & Padding((1, 2, 3)), "2 and for 3 rows"),
        (lambda: BlockCausal((1, 4)).reduced(2, 6), "5 positions.*6 keys"),
        (lambda: Tree((-1, 0, 0)).reduced(2, 2), "3 nodes.*2 keys"),
    ],
)
def test_masks_that_make_no_sense(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()  # type: ignore[operator]


def test_equal_masks_are_one_key_and_tensors_are_kept() -> None:
    assert hash(BlockCausal([1, 4])) == hash(BlockCausal((1, 4)))  # type: ignore[arg-type]
    assert Sliding(5).dense(9, 9, CPU) is Sliding(5).dense(9, 9, CPU)
    tensor = torch.ones(3, 3, dtype=torch.bool)
    assert Dense(tensor) != Dense(tensor)
    changing = And(Causal(), Dense(tensor))
    before = changing.dense(3, 3, CPU)
    tensor[2, 0] = False
    after = changing.dense(3, 3, CPU)
    assert before is not None
    assert after is not None
    assert not torch.equal(before, after)  # it is made anew: the tensor in it has changed


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    from genkit.attention import attention

    case = fixed("prefix", 7, 11)
    with torch.inference_mode():
        attention(case.q, case.k, case.v, mask=case.mask)
    q = case.q.requires_grad_()
    attention(q, case.k, case.v, mask=case.mask).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa:flash", "reference"])
@pytest.mark.parametrize("shape", [(), (5,), (1,), (3, 1), (4, 3, 1), (4, 1, 5), (2, 1, 1, 5)])
def test_tensors_of_any_number_of_axes_broadcast(shape: tuple[int, ...], backend: str) -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)
    look = torch.rand(shape) > 0.5
    wanted = attention(q, k, k, mask=look.expand(2, 4, 3, 5).contiguous(), backend="reference")
    torch.testing.assert_close(attention(q, k, k, mask=look, backend=backend), wanted)
    torch.testing.assert_close(attention(q, k, k, mask=Dense(look) & Prefix(9), backend=backend), wanted)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 5), (2, 3, 1, 5), (3, 1, 3, 5), (1, 2, 4, 3, 5)])
def test_tensors_that_do_not_fit_are_refused(shape: tuple[int, ...], backend: str) -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)
    with pytest.raises(ValueError, match="broadcasts to"):
        attention(q, k, k, mask=torch.ones(shape, dtype=torch.bool), backend=backend)


def test_what_is_no_mask_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="mask is 'causal'; give a bool tensor"):
        attention(x, x, x, mask="causal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Dense\(tensor\)"):
        Causal() & torch.ones(3, 3, dtype=torch.bool)  # type: ignore[operator]
    with pytest.raises(ValueError, match="4 positions: too few for 5 keys"):
        BlockCausal((1, 3)).reduced(5, 5)
    with pytest.raises(ValueError, match="4 queries at the end of 2 keys"):
        BlockCausal((1, 3)).reduced(4, 2)
    with pytest.raises(ValueError, match="do not fit together"):
        attention(x, x[:, :0], x[:, :0])
