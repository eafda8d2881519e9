"""Piecewise: where a piece ends, whose state moves, and how it passes a scale on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit import noise
from genkit.guidance import APG, CFG, Interval, NoGuidance, Scheduled, parse, registry
from genkit.guidance.piecewise import Piecewise
from tests.toys import Run, reference, step_info

GRID = noise.karras(6, 0.05, 3.0).tolist()
X = torch.zeros(1, 1)


def weights(run: Run, stage: str = "step") -> list[float]:
    return [row["weight"] for row in run.guided.trace.rows if row["stage"] == stage]


@pytest.mark.parametrize(("low", "high"), [(GRID[4], GRID[1]), (0.1, 1.5), (0.0, 0.3)])
def test_one_piece_between_two_without_guidance_is_an_interval(low: float, high: float) -> None:
    inner = APG(4.0, momentum=-0.5)
    gated, pieces = Run(Interval(inner, low, high)), Run(Piecewise((NoGuidance(), inner, NoGuidance()), (high, low)))
    assert torch.equal(pieces.out, gated.out)
    assert pieces.nfe == gated.nfe


@pytest.mark.parametrize("text", [t for c in registry().values() for t in c.examples if "gradient" not in parse(t).needs])
def test_one_piece_is_the_method_itself(text: str) -> None:
    inner, run = reference(parse(text)), Run(Piecewise((parse(text),), ()))
    assert torch.equal(run.out, inner.out)
    assert run.nfe == inner.nfe


def test_bounds_belong_to_the_lower_piece_and_hold_for_whole_steps() -> None:
    run = Run(Piecewise((CFG(5.0), CFG(4.0), CFG(3.0)), (GRID[2], GRID[4])))
    assert weights(run) == [5.0, 5.0, 4.0, 4.0, 3.0, 3.0]
    assert weights(run, "second") == [5.0, 5.0, 4.0, 4.0, 3.0]
    by_step = Run(Piecewise((CFG(5.0), CFG(4.0), CFG(3.0)), (2, 4), "step"))
    by_fraction = Run(Piecewise((CFG(5.0), CFG(4.0), CFG(3.0)), (0.34, 0.7), "fraction"))  # int(2.04), int(4.2)
    assert torch.equal(by_step.out, run.out)
    assert torch.equal(by_fraction.out, run.out)


def test_the_first_piece_covers_the_first_step() -> None:
    pieces = (CFG(5.0), CFG(4.0))
    assert Piecewise(pieces, (1,), "step").current(step_info(X, 0, 6)) == 0
    assert Piecewise(pieces, (0,), "step").current(step_info(X, 0, 6)) == 1
    assert Piecewise(pieces, (float("inf"),)).current(step_info(X, sigma=80.0)) == 1
    assert Piecewise((CFG(5.0),), ()).current(step_info(X)) == 0


def test_empty_pieces_are_allowed() -> None:
    run = Run(Piecewise((CFG(5.0), CFG(9.0), CFG(3.0)), (3, 3), "step"))
    assert weights(run) == [5.0] * 3 + [3.0] * 3


def test_each_piece_has_its_own_state() -> None:
    """An average starts anew in the second piece, and stands still while the other acts."""
    apg = APG(3.0, eta=1.0, momentum=0.9)
    made = Piecewise((apg, apg), (2,), "step")
    state = made.init(1)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    got = []
    for i in range(4):
        result, state = made.combine(step_info(X, i, 4), {"cond": one, "uncond": zero}, state)
        got.append(round(float(result.denoised), 6))
    assert got == [3.0, 4.8, 3.0, 4.8]  # 1 + 2 d with d = 1, 1.9, and again


def test_an_override_multiplies_all_pushes_by_one_gain() -> None:
    made = Piecewise((CFG(2.0), CFG(5.0), NoGuidance()), (2, 4), "step")
    assert made.scale == 5.0
    got = [made.weight(step_info(X, i, 6, weight=3.0)) for i in range(6)]
    assert got == [1.5, 1.5, 3.0, 3.0, 1.0, 1.0]
    scheduled = Run(Scheduled(made, "linear"))
    assert weights(scheduled) == pytest.approx([1.0, 1 + 0.4, 1 + 4 * 0.8, 1 + 4 * 1.2, 1.0, 1.0])
    equal = Run(Scheduled(Piecewise((CFG(3.0), CFG(3.0)), (0.5,)), "sine"))
    torch.testing.assert_close(equal.out, reference(Scheduled(CFG(3.0), "sine")).out, rtol=1e-10, atol=1e-10)


def test_expressions_read_back() -> None:
    for made in (
        Piecewise([CFG(2), NoGuidance()], [0.5]),  # type: ignore[arg-type]
        Piecewise((CFG(2.0),), ()),
        Piecewise((CFG(2.0), APG(4.0), CFG(1.5)), (float("inf"), 0)),
    ):
        assert parse(repr(made)) == made
        assert hash(parse(repr(made))) == hash(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((CFG(2.0), CFG(3.0)), ()), "one fewer than the 2 pieces"),
        (((), ()), "one fewer than the 0 pieces"),
        (((CFG(2.0), CFG(3.0), CFG(4.0)), (0.2, 2.0)), r"bounds=\(0.2, 2.0\) must be falling in 'sigma'"),
        (((CFG(2.0), CFG(3.0), CFG(4.0)), (4, 2), "step"), "must be rising in 'step'"),
        (((CFG(2.0), CFG(3.0)), (1.5,), "fraction"), "must be numbers from 0 to 1"),
        (((CFG(2.0), CFG(3.0)), (float("nan"),)), "must be numbers from 0 to inf"),
        (((CFG(2.0), CFG(3.0)), (True,)), "must be numbers"),
        (((CFG(2.0), CFG(3.0)), (-1.0,)), "must be numbers"),
        (((CFG(2.0), CFG(3.0)), (1.0,), "percent"), "unit='percent' must be"),
    ],
)
def test_values_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Piecewise(*arguments)


def test_types_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match=r"pieces has 3\.0, which must be a guidance"):
        Piecewise((CFG(2.0), 3.0), (1.0,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bounds=1\.0 must be a tuple"):
        Piecewise((CFG(2.0), CFG(3.0)), 1.0)  # type: ignore[arg-type]
