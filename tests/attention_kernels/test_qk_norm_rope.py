"""The plain form of QK-norm and RoPE against the formulas and against the layers of genkit's networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from genkit.attention.kernels import qk_norm_rope
from genkit.attention.kernels.qk_norm_rope import bytes_moved
from genkit.models.flowar_velocity import Rope
from genkit.models.llama import RMSNorm, rope_table, rotate, turns


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_of_llama_with_zero_rows_for_the_prefix(dtype: torch.dtype) -> None:
    qkv, table = draw(2, 6, 3, 4, 72, dtype=dtype), rope_table(4, 72, prefix=2)
    q, k = (x.transpose(1, 2) for x in qkv[..., :2, :, :].unbind(-3))
    turned = qk_norm_rope(q, k, table)
    expected = rotate(qkv[..., :2, :, :], turns(table).unsqueeze(-3)).unbind(-3)
    for got, want in zip(turned, expected, strict=True):
        torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)
        assert not got[:, :, :2].any()
        assert got.dtype == dtype


def test_the_rotation_of_flowar() -> None:
    rope, (q, k) = Rope(32, grid=4), draw(2, 1, 3, 20, 32)
    angles = rope.table((2, 4))
    expected = rope((2, 4), q, k)
    turned = qk_norm_rope(q, k, torch.stack((angles.cos(), angles.sin()), -1))
    for got, want in zip(turned, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_rows_of_a_batch_may_stand_at_places_of_their_own() -> None:
    q, k, table = draw(3, 2, 1, 8), draw(3, 1, 1, 8), rope_table(4, 8, prefix=0)
    places = torch.tensor([0, 3, 2])
    whole = qk_norm_rope(q, k, table[places][:, None])
    for b, place in enumerate(places):
        alone = qk_norm_rope(q[b : b + 1], k[b : b + 1], table[place : place + 1])
        for w, a in zip(whole, alone, strict=True):
            torch.testing.assert_close(w[b : b + 1], a, atol=1e-6, rtol=0)


def test_l2_with_a_scale_per_head_is_the_cosine_attention_of_var() -> None:
    q, k, g = draw(2, 4, 5, 72), draw(2, 4, 5, 72) * 3, torch.tensor([0.1, 1.0, 4.0, 9.0]).reshape(1, 4, 1, 1)
    scale = g.clamp(max=math.log(100)).exp()
    got = qk_norm_rope(q, k, norm="l2", q_weight=scale.reshape(4, 1))
    torch.testing.assert_close(got[0], F.normalize(q, dim=-1) * scale, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(got[1].square().sum(-1), torch.ones(2, 4, 5))


def test_rms_with_a_weight_per_channel_before_the_turn() -> None:
    layer, table = RMSNorm(16, eps=1e-3), rope_table(9, 16, prefix=0)
    weight = layer.weight.data.copy_(draw(16))
    q, k = draw(1, 3, 9, 16), draw(1, 1, 9, 16)
    got, plain = qk_norm_rope(q, k, table, norm="rms", eps=1e-3, q_weight=weight)
    expected = rotate(layer(q).transpose(1, 2), turns(table)).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    unweighted = F.rms_norm(k, (16,), eps=1e-3).transpose(1, 2)
    torch.testing.assert_close(plain, rotate(unweighted, turns(table)).transpose(1, 2), atol=2e-6, rtol=0)


def test_it_is_differentiable_and_makes_new_tensors() -> None:
    q, k = draw(1, 2, 4, 8).double().requires_grad_(), draw(1, 2, 4, 8).double()
    table, weight = rope_table(4, 8, prefix=0).double(), draw(8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: qk_norm_rope(a, k, table, norm="l2", q_weight=w)[0], (q, weight))
    assert qk_norm_rope(k, k)[0].data_ptr() != k.data_ptr()


def test_strides_do_not_matter() -> None:
    q, table = draw(8, 4, 3, 2).permute(3, 2, 1, 0), rope_table(4, 8, prefix=0)
    shifted = draw(2, 3, 4, 9)[..., 1:]  # an odd offset, and odd strides
    for x in (q, shifted):
        torch.testing.assert_close(qk_norm_rope(x, x, table)[0], qk_norm_rope(x.contiguous(), x, table)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_nothing_stays_nothing(batch: int, tokens: int) -> None:
    empty = torch.empty(batch, 2, tokens, 8)
    assert qk_norm_rope(empty, empty, torch.ones(tokens, 4, 2), norm="rms")[0].shape == empty.shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.ones(2, 4, 8)}, r"q has shape \(2, 4, 8\)"),
        ({"q": torch.ones(2, 2, 4, 8).long()}, "q is torch.int64"),
        ({"k": torch.ones(2, 2, 5, 8)}, r"k has shape \(2, 2, 5, 8\)"),
        ({"k": torch.ones(2, 2, 4, 8).double()}, "k is torch.float64"),
        ({"table": torch.ones(5, 4, 2)}, r"table has shape \(5, 4, 2\), but must have \(4, 4, 2\) or \(1, 4"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"q_weight": torch.ones(3, 1)}, r"q_weight of shape \(3, 1\)"),
        ({"k_weight": torch.ones(7)}, r"k_weight of shape \(7,\)"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], named: str) -> None:
    arguments = {"q": torch.ones(2, 2, 4, 8), "k": torch.ones(2, 1, 4, 8), "table": torch.ones(4, 4, 2)} | change
    with pytest.raises(ValueError, match=named):
        qk_norm_rope(**arguments)  # type: ignore[arg-type]


def test_the_fused_pass_moves_every_value_twice() -> None:
    q, k, table = torch.ones(2, 16, 256, 72), torch.ones(2, 4, 256, 72), torch.ones(256, 36, 2)
    tensors = 2 * (q.nbytes + k.nbytes) + table.nbytes
    assert bytes_moved(2, 16, 256, 72, kv_heads=4) == tensors
    assert bytes_moved(2, 16, 256, 72, kv_heads=4, fused=False) > 2 * tensors
