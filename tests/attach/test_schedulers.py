"""Steps, stages and noise levels as a scheduler has them."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any, ClassVar

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import Tensor

from genkit.guidance import CFG, StepInfo
from genkit.pipelines.attach import attach
from genkit.samplers.diffusion.scheduler_levels import REFUSED, STATES
from tests.attach.tiny import CASES, Rows, distance, scheduler, sd

INPUTS = CASES["sd"].inputs
FLOW_ONLY = [name for name in STATES if name.startswith("FlowMatch")]
UNREACHED = ["CogVideoXDPM"]  # its step asks for more than any pipeline of the table gives
VP = [name for name in STATES if name not in (*FLOW_ONLY, *UNREACHED)]
NOISY = ("FlowMatchLCM",)  # draws from torch's own generator: Stable Diffusion 3 gives it none
V: dict[str, Any] = {"prediction_type": "v_prediction"}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"use_lu_lambdas": True, "final_sigmas_type": "zero"}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistep", {"use_exponential_sigmas": True}),
    ("EulerDiscrete", {"use_beta_sigmas": True}),
    ("EulerDiscrete", {**V, "use_karras_sigmas": True, "timestep_type": "continuous"}),
    ("EulerDiscrete", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("HeunDiscrete", {**V, "use_karras_sigmas": True}),
    ("DDIM", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DDIM", {"prediction_type": "sample"}),
    ("PNDM", {"skip_prk_steps": False}),
]  # fmt: skip
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOWS = [
    *(("sd3", name, {"shift": 3.0}) for name in FLOW_ONLY),
    *(
        ("sana", name, FLOW)
        for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
    ),
]


def with_scheduler(kind: str, name: str = "sd", **options: Any) -> Any:
    """A tiny pipeline with another scheduler, Stable Diffusion unless it is named."""
    pipe = CASES[name].pipe
    made = type(pipe)(
        **{**pipe.components, "scheduler": scheduler(getattr(diffusers, f"{kind}Scheduler"), **options)},
        **({"requires_safety_checker": False} if name in ("sd", "sd img2img") else {}),
    )
    made.set_progress_bar_config(disable=True)
    return made


class _Watch(CFG):
    """CFG that writes down where it stood, and its estimate of the clean image."""

    seen: ClassVar[list[tuple[StepInfo, Tensor]]] = []

    def combine(self, info: StepInfo, predictions: Any, state: Any) -> Any:
        result, state = super().combine(info, predictions, state)
        self.seen.append((info, result.denoised))
        return result, state


def estimates(scheduler: Any) -> list[Tensor]:
    """What the scheduler takes for the clean image in its steps to come: its own word for it, where it has one."""
    found: list[Tensor] = []
    step, convert = scheduler.step, getattr(scheduler, "convert_model_output", None)
    converted: list[Tensor] = []
    if convert is not None and not isinstance(scheduler, diffusers.DEISMultistepScheduler):  # which converts to noise
        scheduler.convert_model_output = lambda *args, **kwargs: converted.append(convert(*args, **kwargs)) or converted[-1]

    @functools.wraps(step)
    def stepping(output: Tensor, t: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        converted.clear()
        by_hand = of_tables(scheduler, output, t, sample)
        made = step(output, t, sample, *args, return_dict=True, **kwargs)
        own = converted[0] if converted else getattr(made, "pred_original_sample", None)
        found.append(by_hand if own is None else own)
        return made if return_dict else (made.prev_sample,)

    scheduler.step = stepping
    return found


def of_tables(scheduler: Any, output: Tensor, t: Any, x: Tensor) -> Tensor:
    """The clean image by the formulas of the papers."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        begun = scheduler.step_index is not None
        return x - scheduler.sigmas[scheduler.step_index if begun else scheduler.index_for_timestep(t)] * output
    alpha = float(scheduler.alphas_cumprod[int(t)]) ** 0.5
    s = math.sqrt(1 - alpha**2)
    if kind == "epsilon":
        return (x - s * output) / alpha
    return alpha * x - s * output if kind == "v_prediction" else output


def check(name: str, kind: str, options: dict[str, Any]) -> list[StepInfo]:
    """Guided as by itself, and at every evaluation the guidance has the scheduler's own estimate of the clean image."""
    case, pipe = CASES[name], with_scheduler(kind, name, **options)
    torch.manual_seed(0)
    own = case(3.0, pipe=pipe)
    pipe = with_scheduler(kind, name, **options)
    found = estimates(pipe.scheduler)
    _Watch.seen.clear()
    torch.manual_seed(0)
    with attach(pipe, _Watch(3.0)) as run:
        got = case(2.0, pipe=pipe)
    assert distance(got, own) < 1e-5
    calls = {"HeunDiscrete": 7, "FlowMatchHeunDiscrete": 7, "PNDM": 5 if options.get("skip_prk_steps", True) else 13}.get(kind, 4)
    assert run.nfe == [2 * calls] * 2
    assert len(found) == len(_Watch.seen) == calls
    for theirs, (info, ours) in zip(found, _Watch.seen, strict=True):
        assert distance(ours, theirs) < 1e-6, info
    return [info for info, _ in _Watch.seen]


def falls(seen: list[StepInfo]) -> None:
    steps = [info for info in seen if info.stage == "step"]
    assert [info.index for info in steps] == [0, 1, 2, 3]
    assert {info.total for info in seen} == {4}
    assert [info.progress for info in steps] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(info.sigma_next < info.sigma for info in seen[:-1])
    assert seen[-1].sigma_next <= seen[-1].sigma, "DEIS and SA-Solver for flows stay where they are in their last step"
    assert all(a.sigma_next == pytest.approx(b.sigma) for a, b in itertools.pairwise(steps))
    assert all(info.sigma == pytest.approx(info.s / info.alpha if info.alpha else math.inf) for info in steps)


@pytest.mark.parametrize(("kind", "options"), [*((k, o) for k in VP for o in ({}, V)), *OPTIONS], ids=str)
def test_every_scheduler(kind: str, options: dict[str, Any]) -> None:
    seen = check("sd", kind, options)
    falls(seen)
    assert all(info.alpha**2 + info.s**2 == pytest.approx(1) for info in seen)


@pytest.mark.parametrize(("name", "kind", "options"), FLOWS, ids=str)
def test_every_scheduler_of_flows(name: str, kind: str, options: dict[str, Any]) -> None:
    seen = check(name, kind, options)
    falls(seen)
    assert all(info.alpha + info.s == pytest.approx(1) for info in seen)


def names() -> list[str]:
    return [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]


@pytest.mark.parametrize("name", [name for name in names() if name.removesuffix("Scheduler") not in STATES])
def test_every_other_scheduler_is_refused_by_name_before_anything_is_computed(name: str) -> None:
    pipe, cls = with_scheduler("DDIM"), getattr(diffusers, name)
    pipe.scheduler = cls.__new__(cls)
    reason = REFUSED.get(name.removesuffix("Scheduler"))
    message = f"scheduler={name} " + (
        f"cannot be used: {re.escape(reason)}" if reason else "is not known to genkit; use one of DDIM"
    )
    with Rows(pipe.unet) as counted, attach(pipe, "CFG(3.0)"), pytest.raises(ValueError, match=message):
        CASES["sd"](2.0, pipe=pipe)
    assert counted.each == []


def places(pipe: Any, **options: Any) -> tuple[list[StepInfo], Any]:
    """Where the evaluations of a run stood."""
    _Watch.seen.clear()
    with attach(pipe, _Watch(3.0)):
        CASES["sd"](2.0, pipe=pipe, **options)
    return [info for info, _ in _Watch.seen], pipe.scheduler


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


@pytest.mark.parametrize("kind", VP)
def test_image_to_image_starts_late(kind: str) -> None:
    seen = check("sd img2img", kind, {})
    assert (seen[0].index, max(info.index for info in seen)) == (0, 3)
    assert seen[0].sigma < 10, "the run begins at 0.8 of the noise"
    assert [info.sigma for info in seen] == sorted((info.sigma for info in seen), reverse=True)


def test_flow_begins_at_infinity() -> None:
    case = CASES["sd3"]
    with attach(case.pipe, "CFG(3.0)") as run:
        case(2.0)
    sigmas = run.trace.column("sigma")
    t = [float(v) for v in case.pipe.scheduler.sigmas[:-1]]
    assert sigmas == pytest.approx([math.inf if v == 1 else v / (1 - v) for v in t], rel=1e-5)


def test_a_refused_scheduler_leaves_the_pipeline_as_it_was() -> None:
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
