"""The plain form of the fused draw against ``Filters`` and ``Race``."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.attention.kernels import sample_logits
from genkit.attention.kernels.sample_logits import bytes_moved
from genkit.guidance.cfg import CFG
from genkit.random import generator
from genkit.samplers.autoregressive.filters import STREAM, Filters, Race
from tests.attention_kernels.test_guidance import by_method

ORDERS = ("llamagen", "var", "transformers")
KEPT = [(0, 1.0), (2000, 1.0), (0, 0.9), (900, 0.8), (1, 0.5), (5, 1 - 1e-9), (0, 1e-6)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def race(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("top_k", "top_p"), KEPT)
def test_it_draws_the_tokens_of_filters_and_race(order: str, top_k: int, top_p: float) -> None:
    filters, logits = Filters(0.7, top_k, top_p, order), draw(40, 3, 2048)  # type: ignore[arg-type]
    expected = Race(range(40)).draw(logits, filters, 5)
    rows = [torch.empty(3, 2048).exponential_(generator=generator(seed, STREAM, 5)) for seed in range(40)]
    got = sample_logits(logits, torch.stack(rows), temperature=0.7, top_k=top_k, top_p=top_p, order=order)  # type: ignore[arg-type]
    assert torch.equal(got, expected)


def test_all_that_equal_the_kth_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.0]]).repeat(6, 1)
    waits = torch.full((6, 6), 1e9).fill_diagonal_(1e-9)  # row i wants token i
    assert sample_logits(logits, waits, top_k=3).tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(("order", "kept"), [("llamagen", [0, 1, 2]), ("var", [0, 1, 2])])
def test_of_equals_at_the_edge_of_top_p_the_first_stay(order: str, kept: list[int]) -> None:
    logits = torch.zeros(5, 5)
    waits = torch.full((5, 5), 1e6).fill_diagonal_(1e-6)
    drawn = sample_logits(logits, waits, top_p=0.5, order=order)  # type: ignore[arg-type]
    assert drawn.tolist() == [i if i in kept else 0 for i in range(5)]


@pytest.mark.parametrize("scale", [3.0, 0.25])
def test_guidance_is_cfg(scale: float) -> None:
    cond, uncond, waits = draw(9, 500), draw(9, 500, seed=1), race(9, 500)
    guided = by_method(CFG(scale), [(cond, uncond)])[0]
    got = sample_logits(cond, waits, uncond=uncond, scale=scale, top_k=50)
    assert torch.equal(got, sample_logits(guided, waits, top_k=50))
    assert torch.equal(got, sample_logits(cond, waits, uncond=uncond, scale=torch.full((9,), scale), top_k=50))


def test_temperature_zero_is_the_largest() -> None:
    logits = draw(4, 3, 50)
    assert torch.equal(sample_logits(logits, torch.ones(4, 3, 50), temperature=0.0), logits.argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    logits, n = torch.tensor([1.0, 0.5, 0.0, -1.0, 3.0]), 20000
    tokens = sample_logits(logits.expand(n, 5), race(n, 5), temperature=2.0)
    share, p = torch.bincount(tokens, minlength=5) / n, (logits / 2).softmax(-1)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


def test_empty_batch_half_precision_and_no_gradient() -> None:
    assert sample_logits(torch.ones(0, 7), torch.ones(0, 7), top_k=2, top_p=0.5).shape == (0,)
    logits, waits = draw(3, 40).bfloat16().requires_grad_(), race(3, 40)
    tokens = sample_logits(logits, waits, top_k=7)
    assert not tokens.requires_grad
    assert torch.equal(tokens, sample_logits(logits.float(), waits, top_k=7))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.ones(8)}, r"logits has shape \(8,\)"),
        ({"logits": torch.ones(2, 8).long()}, "logits is torch.int64"),
        ({"waits": torch.ones(1, 8)}, r"waits has shape \(1, 8\), but must have \(2, 8\)"),
        ({"uncond": torch.ones(2, 7)}, r"uncond has shape \(2, 7\)"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\)"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"order": "hf"}, "order='hf'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], named: str) -> None:
    arguments = {"logits": torch.ones(2, 8), "waits": torch.ones(2, 8)} | change
    with pytest.raises(ValueError, match=named):
        sample_logits(**arguments)  # type: ignore[arg-type]


def test_the_fused_pass_reads_both_rows_and_the_waits_once() -> None:
    row = torch.ones(8, 16384).nbytes
    assert bytes_moved(8, 16384, top_k=2000, top_p=0.9) == 3 * row + 64
    assert bytes_moved(8, 16384, guided=False) == 2 * row + 64
    assert bytes_moved(8, 16384, top_k=2000, top_p=0.9, fused=False) > 8 * row
