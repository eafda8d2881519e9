"""Low-rank attention: the polynomial, its features, the bound, and the fall-back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from genkit.attention import BACKENDS, Causal, attention, use_attention
from genkit.attention.backends.low_rank import LowRank
from genkit.attention.low_rank import (
    bounded_entries,
    break_even,
    error_bound,
    features,
    low_rank_attention,
    rank,
)


def draw(seed: int, gain: float, d: int = 4, tokens: int = 24, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, d, generator=source, dtype=torch.float64) for _ in range(3))
    return gain * q, k, v


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(("d", "degree"), [(3, 1), (3, 2), (5, 3), (2, 5)])
def test_features_multiply_to_the_taylor_polynomial(d: int, degree: int) -> None:
    x, y, _ = draw(0, 1.0, d)
    s = x @ y.mT
    polynomial = sum(s**j / math.factorial(j) for j in range(degree + 1))
    phi = features(x, degree)
    assert phi.shape[-1] == rank(d, degree) == math.comb(d + degree, degree)
    torch.testing.assert_close(phi @ features(y, degree).mT, polynomial)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), gain=st.floats(0.001, 1.5), degree=st.integers(1, 5), d=st.integers(1, 5), shift=st.floats(-3, 3)
)
def test_error_is_within_the_bound(seed: int, gain: float, degree: int, d: int, shift: float) -> None:
    q, k, v = draw(seed, gain, d)
    k = k + shift  # changes no softmax, but would a polynomial of the raw scores
    centred = k - k.mean(-2, keepdim=True)
    probe = bounded_entries(q, centred)
    spread = float((v.amax(-2) - v.amin(-2)).max()) / 2
    bound = error_bound(probe.limit, degree, spread, probe.square)
    out = low_rank_attention(q, k, v, degree=degree, tolerance=math.inf)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert largest(out, exact) <= bound + 1e-12
    # Whatever the tolerance is, it is kept.
    for tolerance in (1e-1, 1e-3):
        assert largest(low_rank_attention(q, k, v, degree=degree, tolerance=tolerance), exact) <= tolerance


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), gain=st.floats(0.01, 3.0))
def test_probe_bounds_the_scores(seed: int, gain: float) -> None:
    q, k, _ = draw(seed, gain)
    s = q @ k.mT / 2
    probe = bounded_entries(q, k)
    assert probe.entry == max(float(q.abs().max()), float(k.abs().max()))
    assert probe.score == pytest.approx(float(s.abs().max()))
    assert probe.score <= probe.limit * (1 + 1e-12)
    assert probe.square == pytest.approx(float(s.square().mean(-1).max()))


def test_bound_falls_with_degree_and_grows_with_the_scores() -> None:
    for score in (0.1, 0.5, 1.0, 2.0, 5.0):
        bounds = [error_bound(score, degree) for degree in range(1, 12)]
        assert bounds == sorted(bounds, reverse=True)
    for degree in (1, 2, 5):
        bounds = [error_bound(score, degree) for score in (0.0, 0.01, 0.1, 0.5, 0.7, 2.0, 100.0)]
        assert bounds == sorted(bounds)
        assert bounds[0] == 0
        assert bounds[-1] == math.inf
    assert error_bound(0.5, 2, spread=3.0) == pytest.approx(3 * error_bound(0.5, 2))
    assert error_bound(0.5, 2, square=0.01) < error_bound(0.5, 2)
    remainder = math.exp(0.3) - 1 - 0.3
    assert error_bound(0.3, 1) == pytest.approx(2 * remainder / (1 - remainder))


def test_error_falls_with_degree() -> None:
    q, k, v = draw(1, 0.5, tokens=64)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [largest(low_rank_attention(q, k, v, degree=degree, tolerance=math.inf), exact) for degree in range(1, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_too_large_scores_are_computed_exactly() -> None:
    q, k, v = draw(2, 8.0)
    assert torch.equal(low_rank_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    q, k, v = draw(2, 0.01)
    assert torch.equal(low_rank_attention(q, k, v, tolerance=0), F.scaled_dot_product_attention(q, k, v))
    assert not torch.equal(low_rank_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_grouped_queries_other_lengths_and_scales() -> None:
    q, k, v = draw(3, 0.2, heads=4)
    q, k, v = q[:, :, :5], k[:, :2], v[:, :2, :, :3]
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert 0 < largest(low_rank_attention(q, k, v, scale=0.3, degree=4, tolerance=math.inf), exact) < 1e-5
    assert largest(low_rank_attention(q, k, v, scale=0.3, tolerance=0), exact) < 1e-12


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in draw(4, 0.02))
    out = low_rank_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-3, rtol=1e-2)


def test_gradients_pass() -> None:
    q, k, v = (x.requires_grad_() for x in draw(5, 0.1))
    low_rank_attention(q, k, v, degree=5).sum().backward()
    mine = [x.grad.clone() for x in (q, k, v) if x.grad is not None]
    for x in (q, k, v):
        x.grad = None
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert len(mine) == 3
    for grad, x in zip(mine, (q, k, v), strict=True):
        torch.testing.assert_close(grad, x.grad, atol=2e-4, rtol=0)


def test_backend_is_asked_for_by_name_alone() -> None:
    backend = BACKENDS["low_rank"]
    assert not backend.exact
    q, k, v = draw(6, 0.02)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attention(q, k, v), exact)
    with use_attention("low_rank"):
        out = attention(q, k, v)
        masked = attention(q, k, v, mask=Causal())
    assert 0 < largest(out, exact) <= 1e-2
    assert largest(masked, F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 1e-12
    finer = LowRank(degree=3, tolerance=1e-6, name="finer")
    assert finer(q, k, v, None, None).sub(exact).abs().max() < largest(out, exact)


def test_break_even_and_errors() -> None:
    assert break_even(64, 1) == pytest.approx(65 * 130 / 128)
    assert break_even(64, 2) == pytest.approx(2145 * 132 / 128)
    with pytest.raises(ValueError, match="degree=0"):
        low_rank_attention(*draw(0, 1.0), degree=0)
    with pytest.raises(ValueError, match="tolerance=-1"):
        low_rank_attention(*draw(0, 1.0), tolerance=-1)
    for wrong in (lambda: rank(64, 0), lambda: break_even(64, 0), lambda: error_bound(1.0, 0), lambda: rank(64, 1.5)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"degree=(0|1\.5)"):
            wrong()
    with pytest.raises(ValueError, match="score=-1"):
        error_bound(-1.0, 1)


def test_what_a_network_that_diverged_gives_comes_out_as_it_would_otherwise() -> None:
    q, k, v = draw(0, 1.0)
    q[0, 0, 3, 1] = math.nan
    assert error_bound(math.nan, 1) == math.inf
    found = low_rank_attention(q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), equal_nan=True)
    assert found[0, 0, 3].isnan().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
    assert low_rank_attention(q, k, v).shape == (2, 4, 3, 6)
    for name, change in (
        ("q", (q[0], k, v)), ("k", (q, k[..., :7], v)), ("k", (q, k[:1], v)), ("k", (q[:, :3], k, v)), ("v", (q, k, v[:, :, :4])),
        ("v", (q, k, v[0])), ("v", (q[:, :, :0], k, v[:, :0])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} has the shape"):
            low_rank_attention(*change)
    with pytest.raises(ValueError, match="k has the shape"):
        bounded_entries(q, k[..., :7])
