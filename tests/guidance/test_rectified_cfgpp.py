"""Rectified-CFG++ against its formula, written out on the flow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import CFG, Interval, NoGuidance
from genkit.guidance.rectified_cfgpp import RectifiedCFGPP
from genkit.noise import FLOW, VE, VP
from genkit.random import Gaussian
from tests.gaussians import Gaussians, solve
from tests.toys import LABELS, MAIN, SHAPE, Run, conditions, reference, step_info

GRID = noise.karras(6, 0.05, 3.0).tolist()


def velocity(x: Tensor, t: float, label: Tensor) -> Tensor:
    """(x - D) / t of the exact model, on the flow."""
    sigma = torch.full((len(x),), t / (1 - t), dtype=torch.float64)
    return (x - MAIN(x / (1 - t), sigma, label)) / t


def written_out(scale: float, time: str) -> Tensor:
    """The authors' loop: Euler in t with lambda = scale - 1."""
    x = Gaussian([0, 1, 2, 3])(torch.empty(4, *SHAPE, dtype=torch.float64)) * FLOW(3.0)[1]
    none = torch.full_like(LABELS, -1)
    for sigma, sigma_next in itertools.pairwise(GRID):
        t, t_next = sigma / (1 + sigma), sigma_next / (1 + sigma_next)
        cond = velocity(x, t, LABELS)
        x_hat = x + (t_next - t) * cond
        t_hat = t if time == "start" or t_next == 0 else t_next
        v = cond + (scale - 1) * (velocity(x_hat, t_hat, LABELS) - velocity(x_hat, t_hat, none))
        x = x + (t_next - t) * v
    return x


@pytest.mark.parametrize("time", ["start", "end"])
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.5])
def test_formula(scale: float, time: Any) -> None:
    want = written_out(scale, time)
    for path in (FLOW, VE, VP):  # Euler is the same step on every path, and so is the method
        run = Run(RectifiedCFGPP(scale, time=time), "euler", path=path)
        torch.testing.assert_close(run.out, want, rtol=1e-9, atol=1e-9)
        assert run.nfe == [18] * 4
        assert run.guided.ledger.calls == 12


def test_the_times_differ_and_neither_is_cfg() -> None:
    runs = [Run(RectifiedCFGPP(3.0, time=t), "euler").out for t in ("start", "end")] + [reference(CFG(3.0), "euler").out]  # type: ignore[arg-type]
    assert min(float((runs[i] - runs[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_at_the_end_of_a_step_it_is_cfg() -> None:
    """A second evaluation stands at t' already: nothing lies ahead of it."""
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, *SHAPE)
    first = step_info(x, sigma=1.0)._replace(sigma_next=0.5)
    for info, equal in ((first, False), (first._replace(stage="second", s=0.5), True)):
        ours, cfg = (Guided(MAIN, g, conditions(LABELS), 4)(info).denoised for g in (RectifiedCFGPP(3.0), CFG(3.0)))
        assert torch.allclose(ours, cfg, rtol=1e-9, atol=1e-9) == equal
    assert [row["rows"] for row in Run(RectifiedCFGPP(3.0)).guided.trace.rows] == [12] * 11


def test_it_begins_at_pure_noise() -> None:
    """At t = 1 the flow is regular: the run from sigma = inf is the limit of runs from large sigmas."""
    model = Gaussians([1.0, -0.5], [0.3, 1.0], FLOW)
    cond = {"cond": torch.zeros(3, dtype=torch.long), "uncond": torch.ones(3, dtype=torch.long)}
    x = torch.tensor([[-1.0], [0.2], [2.0]], dtype=torch.float64)
    ends = []
    for top in (math.inf, 1e7):
        sigmas = torch.tensor([top, 2.0, 0.5, 0.1, 0.0], dtype=torch.float64)
        ends.append(solve(model, x, sigmas, "flow_euler", FLOW, RectifiedCFGPP(3.0), cond))
    assert torch.isfinite(ends[0]).all()
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_the_sample() -> None:
    quiet, noisy = Run(RectifiedCFGPP(3.0)), Run(RectifiedCFGPP(3.0, noise=0.005))
    difference = (quiet.out - noisy.out).abs().flatten(1).max(1).values
    assert (difference > 1e-5).all()
    assert (difference < 0.1).all()
    assert torch.equal(Run(RectifiedCFGPP(3.0, noise=0.005)).out, noisy.out)
    for i in (0, 3):
        torch.testing.assert_close(Run(RectifiedCFGPP(3.0, noise=0.005), rows=(i,)).out[0], noisy.out[i], rtol=1e-9, atol=1e-9)
    assert RectifiedCFGPP(3.0).needs == {"refine"}
    assert RectifiedCFGPP(3.0, noise=0.005).needs == {"refine", "noise"}


def test_cost_without_guidance_and_outside_an_interval() -> None:
    assert Run(RectifiedCFGPP(1.0)).nfe == reference(NoGuidance()).nfe
    run = Run(Interval(RectifiedCFGPP(3.0), 2, 3, "step"), "euler")
    assert run.nfe == [4 * 1 + 2 * 3] * 4
    assert [row["branches"] for row in run.guided.trace.rows] == ["cond"] * 2 + ["cond+cond+uncond"] * 2 + ["cond"] * 2


def test_errors() -> None:
    with pytest.raises(ValueError, match="RectifiedCFGPP: time='now' must be 'start' or 'end'"):
        RectifiedCFGPP(2.0, time="now")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise=-1 must be a number from 0"):
        RectifiedCFGPP(2.0, noise=-1)
