"""Steps, stages and noise levels as a scheduler has them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

from genkit.guidance import StepInfo
from genkit.pipelines.attach import attach
from tests.attach.tiny import CASES, Case, distance, scheduler, sd

VP = ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep")
INPUTS = CASES["sd"].inputs


def with_scheduler(kind: str, **options: Any) -> Any:
    """The tiny Stable Diffusion pipeline with another scheduler."""
    pipe = sd(scheduler=scheduler(getattr(diffusers, f"{kind}Scheduler"), **options), unet=CASES["sd"].pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def places(pipe: Any, **options: Any) -> tuple[list[StepInfo], Any]:
    """Where the evaluations of a run stood."""
    from genkit.guidance import NoGuidance

    seen: list[StepInfo] = []

    class _Watch(NoGuidance):
        def plan(self, info: StepInfo, state: Any) -> Any:
            seen.append(info)
            return super().plan(info, state)

    with attach(pipe, _Watch()):
        Case(sd, INPUTS)(2.0, pipe=pipe, **options)
    return seen, pipe.scheduler


@pytest.mark.parametrize("kind", VP)
def test_cfg_is_the_pipelines_own_with_every_scheduler(kind: str) -> None:
    pipe, case = with_scheduler(kind), CASES["sd"]
    own = case(3.0, pipe=pipe)
    with attach(pipe, "CFG(3.0)") as run:
        got = case(2.0, pipe=pipe)
    assert distance(got, own) < 1e-5
    calls = {"HeunDiscrete": 7, "PNDM": 5}.get(kind, 4)
    assert run.nfe == [2 * calls] * 2


@pytest.mark.parametrize("kind", VP)
def test_levels_fall_from_step_to_step(kind: str) -> None:
    seen, _ = places(with_scheduler(kind))
    steps = [info for info in seen if info.stage == "step"]
    assert [info.index for info in steps] == [0, 1, 2, 3]
    assert {info.total for info in seen} == {4}
    assert [info.progress for info in steps] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(info.sigma_next < info.sigma for info in seen)
    assert all(a.sigma_next == pytest.approx(b.sigma) for a, b in itertools.pairwise(steps))
    assert all(info.alpha**2 + info.s**2 == pytest.approx(1) for info in seen)
    assert all(info.sigma == pytest.approx(info.s / info.alpha) for info in steps)


def test_second_evaluations_belong_to_their_step() -> None:
    heun, table = places(with_scheduler("HeunDiscrete"))
    assert [(info.index, info.stage) for info in heun] == [
        (0, "step"), (0, "second"), (1, "step"), (1, "second"), (2, "step"), (2, "second"), (3, "step"),
    ]  # fmt: skip
    assert heun[1].sigma == heun[0].sigma == pytest.approx(float(table.sigmas[0]))
    assert heun[1].s / heun[1].alpha == pytest.approx(float(table.sigmas[1]))
    pndm, _ = places(with_scheduler("PNDM"))
    assert [(info.index, info.stage) for info in pndm] == [(0, "step"), (0, "second"), (1, "step"), (2, "step"), (3, "step")]
    prk, _ = places(with_scheduler("PNDM", skip_prk_steps=False))
    assert [info.index for info in prk] == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert [i for i, info in enumerate(prk) if info.stage == "step"] == [0, 4, 8, 12]


def test_an_interval_holds_for_whole_steps_of_heun() -> None:
    pipe = with_scheduler("HeunDiscrete")
    with attach(pipe, "Interval(CFG(3.0), 1, 2, 'step')") as run:
        CASES["sd"](2.0, pipe=pipe)
    assert run.trace.column("rows") == [2, 2, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "HeunDiscrete", "EulerDiscrete", "DPMSolverMultistep"])
def test_image_to_image_starts_late(kind: str) -> None:
    case = CASES["sd img2img"]
    pipe = type(case.pipe)(
        **{**case.pipe.components, "scheduler": scheduler(getattr(diffusers, f"{kind}Scheduler"))}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    own = case(3.0, pipe=pipe)
    with attach(pipe, "CFG(3.0)") as run:
        got = case(2.0, pipe=pipe)
    assert distance(got, own) < 1e-5
    steps, sigmas = run.trace.column("step"), run.trace.column("sigma")
    assert (steps[0], max(steps)) == (0, 3)
    assert sigmas[0] < 10, "the run begins at 0.8 of the noise"
    assert sigmas == sorted(sigmas, reverse=True)


def test_flow_begins_at_infinity() -> None:
    case = CASES["sd3"]
    with attach(case.pipe, "CFG(3.0)") as run:
        case(2.0)
    sigmas = run.trace.column("sigma")
    t = [float(v) for v in case.pipe.scheduler.sigmas[:-1]]
    assert sigmas == pytest.approx([math.inf if v == 1 else v / (1 - v) for v in t], rel=1e-5)


def test_a_scheduler_that_does_not_tell_its_level_is_refused() -> None:
    pipe = with_scheduler("KDPM2Discrete")
    before = dict(pipe.unet.__dict__)
    with attach(pipe, "CFG(3.0)"), pytest.raises(ValueError, match="KDPM2"):
        CASES["sd"](2.0, pipe=pipe)
    assert pipe.unet.__dict__ == before


def test_half_precision() -> None:
    """In bfloat16 the guided prediction is as near to float32 as the pipeline's own."""
    pipe = sd(scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    case, exact = CASES["sd"], CASES["sd"](3.0, pipe=pipe)
    pipe.to(torch.bfloat16)
    inputs = {k: v.bfloat16() for k, v in INPUTS(2).items() if isinstance(v, torch.Tensor)}
    own = case(3.0, pipe=pipe, **inputs)
    with attach(pipe, "CFG(3.0)"):
        got = case(2.0, pipe=pipe, **inputs)
    assert got.dtype == own.dtype
    assert distance(got.float(), exact) < 1.5 * distance(own.float(), exact)
