"""CFG, APG and Interval: hand-worked values, gates, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from genkit.guidance import APG, CFG, Guidance, Interval
from genkit.guidance.apg import project
from tests.toys import Run, step_info

X = torch.zeros(1, 1)


@pytest.mark.parametrize(("scale", "want"), [(0.0, 2.0), (1.0, 5.0), (3.0, 11.0), (-1.0, -1.0), (0.5, 3.5)])
def test_cfg_convention(scale: float, want: float) -> None:
    """Scale 0 is the unconditional prediction, 1 the conditional one: D = 5 + (w - 1) 3."""
    predictions = {"cond": torch.full((1, 2), 5.0), "uncond": torch.full((1, 2), 2.0)}
    assert CFG(scale).combine(step_info(X), predictions, None)[0].denoised.tolist() == [[want, want]]


def test_apg_by_hand() -> None:
    # d = (5, 0) has the parts (1.8, 2.4) along D_c and (3.2, -2.4) across it
    cond, uncond = torch.tensor([[3.0, 4.0]]), torch.tensor([[-2.0, 4.0]])
    predictions = {"cond": cond, "uncond": uncond}
    for guidance, update in (
        (APG(3.0), (3.2, -2.4)),
        (APG(3.0, eta=0.5), (4.1, -1.2)),
        (APG(3.0, threshold=2.5), (1.6, -1.2)),
        (APG(3.0, threshold=7.0), (3.2, -2.4)),
        (APG(3.0, eta=1.0), (5.0, 0.0)),
        (APG(3.0, eta=-1.0), (1.4, -4.8)),
    ):
        got = guidance.combine(step_info(cond), predictions, guidance.init(1))[0].denoised
        torch.testing.assert_close(got, cond + 2 * torch.tensor([update]), msg=repr(guidance))


def test_apg_average_runs_over_evaluations() -> None:
    guidance = APG(2.0, eta=1.0, momentum=-0.5)
    cond, zero = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    state, got = guidance.init(1), []
    for factor in (4.0, 4.0, 0.0):
        result, state = guidance.combine(step_info(cond), {"cond": factor * cond, "uncond": zero}, state)
        got.append((result.denoised - factor * cond) / cond)
    assert [g.tolist() for g in got] == [[[4.0, 4.0]], [[2.0, 2.0]], [[-1.0, -1.0]]]


def test_projection_parts() -> None:
    g = torch.Generator().manual_seed(1)
    delta, axis = torch.randn(3, 2, 4, generator=g), torch.randn(3, 2, 4, generator=g)
    parallel, orthogonal = project(delta, axis)
    torch.testing.assert_close(parallel + orthogonal, delta)
    assert (orthogonal * axis).flatten(1).sum(1).abs().max() < 1e-5
    assert torch.equal(project(delta, torch.zeros_like(axis))[1], delta)


def test_apg_of_equal_or_zero_predictions_is_finite() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    guidance = APG(5.0, momentum=-0.5, threshold=2.0)
    for cond, uncond in ((zero, zero), (one, one), (zero, one)):
        result = guidance.combine(step_info(one), {"cond": cond, "uncond": uncond}, None)[0].denoised
        assert torch.isfinite(result).all()
    assert torch.equal(guidance.combine(step_info(one), {"cond": one, "uncond": one}, None)[0].denoised, one)


@pytest.mark.parametrize(
    ("interval", "sigma", "index", "active"),
    [
        (Interval(CFG(2.0), 0.5, 2.0), 2.0, 0, True),  # closed above
        (Interval(CFG(2.0), 0.5, 2.0), 0.5, 0, False),  # open below
        (Interval(CFG(2.0), 0.5, 2.0), 0.5000001, 0, True),
        (Interval(CFG(2.0), 0.5, 2.0), 2.0000001, 0, False),
        (Interval(CFG(2.0), 1.0, 1.0), 1.0, 0, False),
        (Interval(CFG(2.0), 0.0, math.inf), math.inf, 0, True),
        (Interval(CFG(2.0), 2, 4, "step"), 1.0, 2, True),
        (Interval(CFG(2.0), 2, 4, "step"), 1.0, 4, True),
        (Interval(CFG(2.0), 2, 4, "step"), 1.0, 5, False),
        (Interval(CFG(2.0), 3, 3, "step"), 1.0, 3, True),
        (Interval(CFG(2.0), 0.2, 0.5, "fraction"), 1.0, 1, False),
        (Interval(CFG(2.0), 0.2, 0.5, "fraction"), 1.0, 2, True),
        (Interval(CFG(2.0), 0.2, 0.5, "fraction"), 1.0, 5, False),
    ],
)
def test_gate(interval: Interval, sigma: float, index: int, active: bool) -> None:
    info = step_info(X, index, 10)._replace(sigma=sigma)
    assert interval.active(info) is active
    assert len(interval.plan(info, None)) == 1 + active
    assert interval.weight(info) == (2.0 if active else 1.0)


def test_gate_looks_at_the_step_not_at_the_evaluation() -> None:
    """The second evaluation of the step that begins inside is made below the interval, and is guided."""
    run = Run(Interval(CFG(3.0), 0.5, 1.5))
    for row in run.guided.trace.rows:
        assert (row["rows"] == 8) == (0.5 < row["sigma"] <= 1.5)
    assert any(row["stage"] == "second" and row["rows"] == 8 for row in run.guided.trace.rows)


@pytest.mark.parametrize("sampler", ["heun(churn=5)", "flow_heun(churn=5)"])
def test_churn_does_not_move_a_step_across_the_gate(sampler: str) -> None:
    # a step begins at 1.57, which churn raises to 2.2
    plain, churned = Run(Interval(CFG(3.0), 0.5, 2.0)), Run(Interval(CFG(3.0), 0.5, 2.0), sampler)
    assert [row["rows"] for row in churned.guided.trace.rows] == [row["rows"] for row in plain.guided.trace.rows]


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(NAN), r"CFG: scale=nan must be a finite number"),
        (lambda: CFG(math.inf), r"CFG: scale=inf must be a finite number"),
        (lambda: CFG(-math.inf), r"CFG: scale=-inf must be a finite number"),
        (lambda: CFG(10**400), r"CFG: scale=1000.* must be a finite number"),
        (lambda: CFG(True), r"CFG: scale=True must be a finite number"),
        (lambda: CFG("3"), r"CFG: scale='3' must be a finite number"),
        (lambda: CFG(None), r"CFG: scale=None must be a finite number"),
        (lambda: CFG(1j), r"CFG: scale=1j must be a finite number"),
        (lambda: CFG(torch.tensor(3.0)), r"CFG: scale=tensor\(3\.\) must be a finite number"),
        (lambda: APG(3.0, eta=math.inf), r"APG: eta=inf must be a finite number"),
        (lambda: APG(3.0, momentum=1), r"APG: momentum=1 must be a number strictly between -1 and 1"),
        (lambda: APG(3.0, momentum=-1.0), r"APG: momentum=-1\.0 must be a number strictly between -1 and 1"),
        (lambda: APG(3.0, threshold=-1), r"APG: threshold=-1 must be a number from 0 to inf"),
        (lambda: APG(3.0, threshold=NAN), r"APG: threshold=nan must be"),
        (lambda: Interval(CFG(2.0), 5.42, 0.28), r"low=5\.42 is above high=0\.28.*Interval\(inner, 0\.28, 5\.42\)"),
        (lambda: Interval(CFG(2.0), -1, 2), r"Interval: low=-1 must be a number from 0 to inf"),
        (lambda: Interval(CFG(2.0), NAN, 2), r"Interval: low=nan must be"),
        (lambda: Interval(CFG(2.0), 0, 10**400), r"Interval: high=1000.* must be"),
        (lambda: Interval(CFG(2.0), 0.2, 1.5, "fraction"), r"Interval: high=1\.5 must be a number from 0 to 1"),
        (lambda: Interval(CFG(2.0), 0.2, 0.5, "time"), r"Interval: unit='time' must be 'sigma', 'step' or 'fraction'"),
    ],
)
def test_bad_argument_names_itself_and_what_works(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("inner", [3.0, "CFG(3.0)", None, CFG])
def test_inner_must_be_a_guidance(inner: Any) -> None:
    with pytest.raises(TypeError, match=r"Interval: inner=.* must be a guidance, for example CFG\(3\.0\)"):
        Interval(inner, 0.0, 1.0)


def test_protocol_without_methods_refuses() -> None:
    with pytest.raises(NotImplementedError):
        Guidance().plan(step_info(X), None)
    with pytest.raises(NotImplementedError):
        Guidance().rule(step_info(X), {}, None)
