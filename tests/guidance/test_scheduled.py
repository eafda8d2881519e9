"""Scheduled: the weight at every step, what is not evaluated, and bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled
from genkit.guidance.scheduled import SHAPES
from tests.toys import Run, step_info

X = torch.zeros(1, 1)


def weights(guidance: Guidance, total: int) -> list[float]:
    return [guidance.weight(step_info(X, i, total)) for i in range(total)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 3, 5, 8, 18, 50, 251])
@pytest.mark.parametrize("scale", [-2.0, 0.5, 3.0, 16.0])
def test_mean_of_the_weights_is_the_scale(shape: str, total: int, scale: float) -> None:
    got = weights(Scheduled(CFG(scale), shape, power=0.7), total)
    assert sum(got) / total == pytest.approx(scale, abs=1e-12 * max(1, abs(scale)) * total)


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_value_is_the_scale_if_the_mean_is_not_preserved(shape: str) -> None:
    got = weights(Scheduled(CFG(5.0), shape, power=3.0, preserve_mean=False), 21)
    assert max(got) == pytest.approx(5.0)
    assert min(got) >= 1.0


def test_direction_of_the_curves() -> None:
    """Rising means: least guidance in the noise, most at the image."""
    rising = {"linear", "cosine", "power_cosine"}
    falling = {"inverse_linear", "sine"}
    for shape in rising | falling:
        got = weights(Scheduled(CFG(4.0), shape), 9)
        assert got == sorted(got, reverse=shape in falling)
        assert got[0] != got[-1]
    for shape, low in (("lambda", (0, 8)), ("v", (4,))):
        got = weights(Scheduled(CFG(4.0), shape), 9)
        assert [i for i, w in enumerate(got) if w == 1] == list(low)
        assert got == pytest.approx(got[::-1])
    assert set(SHAPES) == rising | falling | {"constant", "v", "lambda"}


@pytest.mark.parametrize(("up", "down"), [("linear", "inverse_linear"), ("cosine", "sine")])
def test_mirror_images(up: str, down: str) -> None:
    assert weights(Scheduled(CFG(4.0), up), 12) == pytest.approx(weights(Scheduled(CFG(4.0), down), 12)[::-1])


def test_power_moves_the_rise() -> None:
    middle = [weights(Scheduled(CFG(2.0), "power_cosine", power=p, preserve_mean=False), 11)[5] for p in (0.1, 1.0, 4.0)]
    assert middle == pytest.approx([1 + (1 - math.cos(math.pi * 0.5**p)) / 2 for p in (0.1, 1.0, 4.0)])
    assert middle == sorted(middle, reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_clamp_is_a_floor_under_what_is_added(shape: str) -> None:
    plain = weights(Scheduled(CFG(5.0), shape), 13)
    clamped = weights(Scheduled(CFG(5.0), shape, clamp=1.5), 13)
    assert clamped == pytest.approx([max(w, 2.5) for w in plain])


def test_constant_below_its_clamp_is_raised() -> None:
    assert weights(Scheduled(CFG(2.0), "constant", clamp=3.0), 4) == [4.0] * 4


def test_nested_curves_multiply() -> None:
    got = weights(Scheduled(Scheduled(CFG(4.0), "linear"), "sine"), 10)
    a, b = (weights(Scheduled(CFG(2.0), shape), 10) for shape in ("linear", "sine"))
    assert got == pytest.approx([1 + 3 * (p - 1) * (q - 1) for p, q in zip(a, b, strict=True)])


@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: Interval(g, 0, math.inf), lambda g: Adaptive(g, 1.5)])
def test_reaches_the_method_through_other_combinators(wrap: Any) -> None:
    plain = Scheduled(CFG(4.0), "cosine", clamp=0.5)
    assert weights(Scheduled(wrap(CFG(4.0)), "cosine", clamp=0.5), 8) == weights(plain, 8)
    assert weights(wrap(plain), 8) == weights(plain, 8)
    assert torch.equal(Run(Scheduled(wrap(CFG(4.0)), "cosine", clamp=0.5)).out, Run(plain).out)


def test_weight_acts_on_the_prediction() -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predictions = {"cond": x, "uncond": x.flip(1)}
    for method in (CFG, APG):
        guidance = Scheduled(method(4.0), "linear")
        for i in range(1, 6):
            info = step_info(x, i, 6)
            want = method(1 + 3 * 2 * i / 5).combine(info, predictions, None)[0].denoised
            torch.testing.assert_close(guidance.combine(info, predictions, None)[0].denoised, want)


def test_steps_at_weight_1_cost_one_row() -> None:
    run = Run(Scheduled(CFG(3.0), "lambda"))  # 0 at the first and at the last of 6 steps: 2 and 1 evaluations
    assert run.nfe == [11 + 8] * 4
    assert [row["weight"] for row in run.guided.trace.rows if row["rows"] == 4] == [1.0] * 3


def test_without_guidance_inside_it_does_nothing() -> None:
    assert weights(Scheduled(NoGuidance(), "linear", clamp=2.0), 5) == [1.0] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "linaer"}, r"Scheduled: shape='linaer' is unknown; use one of constant, linear"),
        ({"power": 0.0}, r"Scheduled: power=0\.0 must be a number strictly between 0 and"),
        ({"power": float("nan")}, r"Scheduled: power=nan must be"),
        ({"clamp": -1.0}, r"Scheduled: clamp=-1\.0 must be a number from 0 to"),
        ({"preserve_mean": 1}, r"Scheduled: preserve_mean=1 must be True or False"),
    ],
)
def test_bad_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduled(CFG(2.0), **arguments)
