"""The plain form of AdaLN against the layers of VAR and FlowAR."""

from __future__ import annotations

import pytest
import torch

from genkit.attention.kernels import gated_modulate, modulate
from genkit.attention.kernels.modulate import bytes_moved
from genkit.models.flowar_velocity import rms_norm
from genkit.models.var_layers import layer_norm


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]), dtype=torch.float64).to(dtype)


def test_layer_norm_with_a_gain_that_holds_the_one_is_vars() -> None:
    x, gain, shift = draw(2, 5, 72), draw(2, 1, 72), draw(72)
    assert torch.equal(modulate(x, gain, shift, offset=0), torch.addcmul(shift, layer_norm(x), gain))


def test_rms_norm_from_place_to_place_is_flowars() -> None:
    x, scale, shift = draw(2, 5, 96), draw(2, 5, 96) * 0.5, draw(2, 5, 96) + 1
    torch.testing.assert_close(modulate(x, scale, shift, norm="rms"), rms_norm(x) * (1 + scale) + shift, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_gated_sum_comes_first(norm: str) -> None:
    x, branch, gate, scale, shift = draw(2, 4, 8), draw(2, 4, 8) * 2, draw(2, 1, 8), draw(8), draw(1, 4, 8)
    h, y = gated_modulate(x, branch, gate, scale, shift, norm=norm)  # type: ignore[arg-type]
    assert torch.equal(h, torch.addcmul(x, gate, branch))
    assert torch.equal(y, modulate(h, scale, shift, norm=norm))  # type: ignore[arg-type]


def test_half_precision_is_rounded_once_and_types_promote() -> None:
    x, scale, shift = draw(2, 3, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    assert torch.equal(modulate(x, scale, shift), modulate(x.float(), scale.float(), shift.float()).bfloat16())
    assert modulate(x, scale.float(), shift).dtype == torch.float32


def test_it_is_differentiable() -> None:
    values = [v.double().requires_grad_() for v in (draw(1, 2, 6), draw(1, 2, 6) + 1, draw(1, 1, 6), draw(6), draw(6) - 1)]
    assert torch.autograd.gradcheck(gated_modulate, values)


def test_strides_and_empty_batches() -> None:
    x, one = draw(8, 5, 2).permute(2, 1, 0), torch.ones(8)
    assert torch.equal(modulate(x, one, one), modulate(x.contiguous(), one, one))
    assert modulate(x[:0], one, one).shape == (0, 5, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.ones(2, 8)}, r"x has shape \(2, 8\)"),
        ({"scale": torch.ones(3, 1, 8)}, r"scale of shape \(3, 1, 8\) cannot be broadcast to \(2, 4, 8\)"),
        ({"shift": torch.ones(7)}, r"shift of shape \(7,\)"),
        ({"scale": torch.ones(8).int()}, "scale is torch.int32"),
        ({"norm": "batch"}, "norm='batch'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], named: str) -> None:
    arguments = {"x": torch.ones(2, 4, 8), "scale": torch.ones(8), "shift": torch.ones(8)} | change
    with pytest.raises(ValueError, match=named):
        modulate(**arguments)  # type: ignore[arg-type]


def test_the_fused_pass_reads_and_writes_once() -> None:
    x, row = torch.ones(2, 256, 1152), torch.ones(2, 1152)
    assert bytes_moved(2, 256, 1152) == 2 * x.nbytes + 2 * row.nbytes
    assert bytes_moved(2, 256, 1152, gated=True, per_place=True) == 7 * x.nbytes
    assert bytes_moved(2, 256, 1152, fused=False) > 2 * bytes_moved(2, 256, 1152)
