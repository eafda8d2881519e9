"""ReuseDelta: when the unconditional branch is evaluated, and what stands in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit import noise
from genkit.guidance import CFG, Interval, Scheduled
from genkit.guidance.reuse_delta import ReuseDelta
from genkit.noise import FLOW
from tests.toys import Run, reference, step_info

ONE = torch.ones(1, 1, dtype=torch.float64)


def guided_rows(run: Run) -> str:
    """One letter an evaluation: U where the unconditional branch was evaluated; second evaluations in lower case."""
    rows = run.guided.trace.rows
    letters = ["U" if "uncond" in row["branches"] else "C" for row in rows]
    return "".join(a if row["stage"] == "step" else a.lower() for a, row in zip(letters, rows, strict=True))


def test_every_evaluation_is_cfg() -> None:
    for sampler in ("euler", "heun", "dpmpp_2m"):
        run, cfg = Run(ReuseDelta(3.0, every=1), sampler), reference(CFG(3.0), sampler)
        torch.testing.assert_close(run.out, cfg.out, rtol=1e-10, atol=1e-10)
        assert run.nfe == cfg.nfe


def test_both_evaluations_of_a_step_are_alike() -> None:
    assert guided_rows(Run(ReuseDelta(3.0))) == "UuCcUuCcUuC"
    assert guided_rows(Run(ReuseDelta(3.0, every=3))) == "UuCcCcUuCcC"
    assert guided_rows(Run(ReuseDelta(3.0, every=9))) == "UuCcCcCcCcC"
    assert guided_rows(Run(ReuseDelta(3.0), "euler")) == "UCUCUC"
    assert Run(ReuseDelta(3.0), "euler").nfe == [9] * 4  # of 12


def test_counting_begins_with_the_first_guided_step() -> None:
    assert guided_rows(Run(Interval(ReuseDelta(3.0), 1, 4, "step"), "euler")) == "CUCUCC"
    assert guided_rows(Run(Scheduled(ReuseDelta(3.0), "linear"), "euler")) == "CUCUCU"
    again = Interval(ReuseDelta(3.0), 3, 5, "step")
    assert guided_rows(Run(again, "euler")) == guided_rows(Run(again, "euler")) == "CCCUCU"  # nothing is left from a run


def velocities(made: ReuseDelta, places: list[tuple[int, str, float]], deltas: list[float]) -> list[float]:
    """Guided velocities where v_c is 1 and v_c - v_u is given; an unconditional branch that is not planned is not given."""
    state, out = made.init(1), []
    for (index, stage, sigma), delta in zip(places, deltas, strict=True):
        info = step_info(2 * ONE, index, 6, sigma=sigma, path=FLOW, stage=stage)
        v = {"cond": ONE, "uncond": ONE - delta}
        predictions = {n: noise.to_x0(v[n], info.x, info.alpha, info.s, "flow") for n in [b.name for b in made.plan(info, state)]}
        result, state = made.combine(info, predictions, state)
        out.append(round(float(noise.from_x0(result.denoised, info.x, info.alpha, info.s, "flow")), 9))
    return out


def test_the_latest_delta_is_reused_as_a_velocity() -> None:
    places = [(0, "step", 3.0), (0, "second", 1.0), (1, "step", 1.0), (1, "second", 0.4), (2, "step", 0.4)]
    assert velocities(ReuseDelta(3.0), places, [0.1, 0.2, 9.0, 9.0, 0.3]) == [1.2, 1.4, 1.4, 1.4, 1.6]


def test_a_run_that_goes_back_evaluates_anew() -> None:
    places = [(3, "step", 1.0), (1, "step", 2.0), (2, "step", 1.5)]
    assert velocities(ReuseDelta(2.0), places, [0.1, 0.2, 9.0]) == [1.1, 1.2, 1.2]


def test_velocities_age_better_than_estimates() -> None:
    """Why the delta is kept in flow space: in x0 space the same reuse is farther from CFG."""

    class _InX0(ReuseDelta):
        space = "x0"

    for sampler in ("euler", "heun", "dpmpp_2m"):
        for scale in (2.0, 4.0):
            full = reference(CFG(scale), sampler).out
            ours, other = (float((Run(g, sampler).out - full).abs().mean()) for g in (ReuseDelta(scale), _InX0(scale)))
            assert ours < other
            assert ours < 0.3 * float((reference(CFG(1.0), sampler).out - full).abs().mean())


@pytest.mark.parametrize("every", [0, -2, 1.5, float("nan"), False, "two"])
def test_every_is_a_whole_number(every: Any) -> None:
    with pytest.raises(ValueError, match=r"ReuseDelta: every=.* must be an integer from 1 on"):
        ReuseDelta(3.0, every)
