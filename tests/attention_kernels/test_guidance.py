"""The plain form of the guidance update against ``CFG`` and ``APG``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from genkit.attention.kernels import guidance_update
from genkit.attention.kernels.guidance import bytes_moved
from genkit.guidance.apg import APG
from genkit.guidance.base import Guidance, StepInfo
from genkit.guidance.cfg import CFG


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_method(guidance: Guidance, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    state, out = guidance.init(len(steps[0][0])), []
    for cond, uncond in steps:
        info = StepInfo(0, 1, 0.0, "step", 1.0, 0.0, 1.0, 1.0, torch.zeros_like(cond))
        result, state = guidance.combine(info, {"cond": cond, "uncond": uncond}, state)
        out.append(result.denoised)
    return out


OPTIONS: list[dict[str, float]] = [
    {"eta": 0.0},
    {"eta": 0.5, "momentum": -0.5, "threshold": 2.5},
    {"eta": 1.0, "momentum": 0.75},
    {"eta": 1.0, "threshold": 1.0},
    {"eta": -0.25, "threshold": math.inf},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_apg_bit_for_bit(options: dict[str, float], dtype: torch.dtype) -> None:
    steps = [(draw(3, 4, 6, 5, seed=i, dtype=dtype), draw(3, 4, 6, 5, seed=9 + i, dtype=dtype)) for i in range(3)]
    average, out = None, []
    for cond, uncond in steps:
        guided, average = guidance_update(cond, uncond, 4.0, average=average, **options)
        out.append(guided)
    expected = by_method(APG(4.0, **options), steps)
    assert all(torch.equal(got, want) for got, want in zip(out, expected, strict=True))
    assert (average is None) == (not options.get("momentum"))


@pytest.mark.parametrize("scale", [4.0, 0.3, -1.0])
def test_the_defaults_are_cfg_bit_for_bit(scale: float) -> None:
    cond, uncond = draw(2, 3, 7), draw(2, 3, 7, seed=1)
    assert torch.equal(guidance_update(cond, uncond, scale)[0], by_method(CFG(scale), [(cond, uncond)])[0])


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_every_sample_may_have_a_scale_of_its_own(options: dict[str, Any]) -> None:
    cond, uncond, scales = draw(3, 20), draw(3, 20, seed=1), [1.0, 2.5, -3.0]
    together = guidance_update(cond, uncond, torch.tensor(scales), **options)[0]
    for b, scale in enumerate(scales):
        alone = guidance_update(cond[b : b + 1], uncond[b : b + 1], scale, **options)[0]
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-6, rtol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    cond, uncond = draw(2, 400, dtype=torch.bfloat16), draw(2, 400, seed=1, dtype=torch.bfloat16)
    got = guidance_update(cond, uncond, 5.0, eta=0.0, threshold=3.0)[0]
    exact = guidance_update(cond.double(), uncond.double(), 5.0, eta=0.0, threshold=3.0)[0]
    assert torch.equal(got, exact.to(torch.bfloat16))


def test_a_conditional_prediction_of_zeros_has_no_direction() -> None:
    cond, uncond = torch.zeros(1, 6), draw(1, 6)
    torch.testing.assert_close(guidance_update(cond, uncond, 3.0, eta=0.0)[0], -2 * uncond)


def test_it_is_differentiable() -> None:
    cond, uncond = draw(2, 5).double().requires_grad_(), draw(2, 5, seed=1).double().requires_grad_()
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    options = {"eta": 0.5, "momentum": 0.5, "threshold": 1.0, "average": draw(2, 5, seed=2).double()}
    assert torch.autograd.gradcheck(lambda c, u, w: guidance_update(c, u, w, **options)[0], (cond, uncond, scale))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_nothing_stays_nothing(shape: tuple[int, ...]) -> None:
    assert guidance_update(torch.ones(shape), torch.ones(shape), 2.0, eta=0.0)[0].shape == shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cond": torch.ones(3)}, r"cond has shape \(3,\)"),
        ({"uncond": torch.ones(2, 4)}, r"uncond has shape \(2, 4\), but must have \(2, 3\)"),
        ({"uncond": torch.ones(2, 3).half()}, "uncond is torch.float16"),
        ({"average": torch.ones(1, 3)}, r"average has shape \(1, 3\)"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\), but must have \(2,\)"),
        ({"scale": math.nan}, "scale=nan"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"threshold": -1.0}, "threshold=-1.0"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], named: str) -> None:
    arguments = {"cond": torch.ones(2, 3), "uncond": torch.ones(2, 3), "scale": 2.0} | change
    with pytest.raises(ValueError, match=named):
        guidance_update(**arguments)  # type: ignore[arg-type]


def test_two_passes_read_and_write_what_they_must() -> None:
    one = torch.ones(4, 16384).nbytes
    assert bytes_moved(4, 16384, eta=1.0) == 3 * one
    assert bytes_moved(4, 16384) == (2 + 3) * one
    assert bytes_moved(4, 16384, momentum=-0.5, threshold=5.0) == (4 + 3) * one
    assert bytes_moved(4, 16384, momentum=-0.5, threshold=5.0, fused=False) > 5 * 7 * one
