"""torch.compile of functions that call attention: whole graphs, and no stale choice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from genkit.attention import BACKENDS, AttentionBackend, Mask, attention, use_attention
from tests.attention_core.cases import deviation, fixed


class Seven(AttentionBackend):
    name = "seven"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        return torch.full_like(q, 7)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BACKENDS, "seven", Seven())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


KINDS = ["none", "causal", "block_causal", "prefix", "tree", "sliding", "padding", "dense", "and"]
CALLS = [*((None, kind) for kind in KINDS), ("sdpa:math", "dense"), ("flex", "block_causal"), ("flex", "tree"), ("flex", "dense")]


@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_one_graph_for_every_mask(kind: str, name: str | None) -> None:
    case = fixed(kind)

    @torch.compile(fullgraph=True, backend="eager")
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 1, k, v, mask=case.mask, backend=name)

    assert deviation(call(case.q, case.k, case.v), case) < 1e-5


def test_a_choice_from_outside_is_never_stale() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def call(x: Tensor) -> Tensor:
        return attention(x, x, x) + 0

    x, found = torch.zeros(1, 1, 3, 4), []
    for _ in range(3):
        assert call(x)[0, 0, 0, 0] == 0
        with use_attention("seven"):
            assert call(x)[0, 0, 0, 0] == 7
            thread = threading.Thread(target=lambda: found.append(float(call(x)[0, 0, 0, 0])))
            thread.start()
            thread.join()
    assert found == [0, 0, 0]
    assert counter.frame_count == 2  # one for each choice


def test_gradients_through_a_compiled_call() -> None:
    case = fixed("block_causal")
    q = case.q.requires_grad_()
    call = torch.compile(lambda q: attention(q, case.k, case.v, mask=case.mask), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(call(q).sum(), q)
    (wanted,) = torch.autograd.grad(attention(q, case.k, case.v, mask=case.mask, backend="reference").sum(), q)
    assert (found - wanted).abs().max() < 1e-5
