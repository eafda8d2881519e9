"""The emulation of tiled softmax: rounding as the dtypes do it, and the laws of tiles and bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genkit.attention.rounding import MANTISSA, round_mantissa, tiled_attention


def inputs(keys: int = 512, gain: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, 32, generator=source, dtype=torch.float64) for n in (32, keys, keys))
    return gain * q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, bits: int) -> Tensor:
    """Softmax attention operation by operation, each rounded."""

    def r(x: Tensor) -> Tensor:
        return round_mantissa(x, bits)

    scores = r(r(q @ k.mT) * q.shape[-1] ** -0.5)
    weights = r(r(scores - scores.amax(-1, keepdim=True)).exp())
    return r(r(weights @ v) / r(weights.sum(-1, keepdim=True)))


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@given(st.lists(st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=1, max_size=20))
def test_rounding_is_that_of_the_dtypes(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        # bfloat16 by way of float32 would round twice, and torch's conversion from float64 does
        once = x if dtype is torch.float32 else x.float().double()
        assert torch.equal(round_mantissa(once, MANTISSA[dtype]), once.to(dtype).double())
    assert torch.equal(round_mantissa(x, 52), x)


def test_rounding_holds_at_ties_and_far_exponents() -> None:
    x = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -(2.0**400) * (1 + 2**-9), 2.0**-400 * (1 + 2**-7), -math.inf, 0.0], dtype=torch.float64
    )
    expected = [1.0, 1 + 2**-6, -(2.0**400), 2.0**-400 * (1 + 2**-7), -math.inf, 0.0]
    assert round_mantissa(x, 7).tolist() == expected
    half = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    assert torch.equal(round_mantissa(half, 10), half.half().double())


def test_rounding_names_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32"):
        round_mantissa(torch.ones(1), 7)
    with pytest.raises(ValueError, match="bits=53"):
        round_mantissa(torch.ones(1, dtype=torch.float64), 53)
    with pytest.raises(ValueError, match="tile=0"):
        tiled_attention(*inputs(8), tile=0)


@pytest.mark.parametrize("tile", [1, 7, 64, 512, 1000])
def test_unrounded_tiles_are_the_reference(tile: int) -> None:
    q, k, v = inputs()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert rms(tiled_attention(q, k, v, tile=tile), exact) < 1e-15
    torch.testing.assert_close(tiled_attention(q, k, v, tile=tile, scale=0.3), (0.3 * q @ k.mT).softmax(-1) @ v)


@pytest.mark.parametrize("bits", [4, 7, 10, 23])
def test_one_tile_is_the_plain_softmax(bits: int) -> None:
    q, k, v = inputs()
    expected = plain(q, k, v, bits)
    assert torch.equal(tiled_attention(q, k, v, bits=bits), expected)
    assert torch.equal(tiled_attention(q, k, v, bits=bits, tile=512), expected)
    assert not torch.equal(tiled_attention(q, k, v, bits=bits, tile=256), expected)


@pytest.mark.parametrize("tile", [None, 128, 16])
def test_deviation_falls_with_every_bit(tile: int | None) -> None:
    q, k, v = inputs(256)
    exact = tiled_attention(q, k, v)
    found = [rms(tiled_attention(q, k, v, bits=bits, tile=tile), exact) for bits in (2, 4, 7, 10, 16, 23, 40)]
    assert found == sorted(found, reverse=True)
    # In proportion: a bit more halves it.
    assert math.log2(found[2] / found[5]) == pytest.approx(23 - 7, abs=1)


@pytest.mark.parametrize("bits", [7, 10, 23])
def test_smaller_tiles_deviate_more(bits: int) -> None:
    q, k, v = inputs()
    exact = tiled_attention(q, k, v)
    found = [rms(tiled_attention(q, k, v, bits=bits, tile=tile), exact) for tile in (512, 128, 32, 8, 2)]
    assert found == sorted(found)
    assert found[-1] > 1.5 * found[0]
