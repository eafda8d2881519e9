"""Every family of pipelines: guided as by itself, at exactly the planned rows, and untouched afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch

from genkit.pipelines.attach import attach
from genkit.pipelines.attach.adapters import ADAPTERS, find
from tests.attach.tiny import CASES, Rows, denoisers, distance
from tests.attach.variants import ALL, DISTILLED

PIPELINES = pytest.mark.parametrize("name", ALL)
FIRST = ("sd", "sd control", "sd3", "pixart", "sana", "dit", "flux", "qwen", "wan", "hunyuan", "lumina 2", "z-image")
FAMILIES = pytest.mark.parametrize("name", FIRST)  # one pipeline of each


def test_every_pipeline_of_the_table_is_run_here() -> None:
    """Whoever adds a class to the table adds a tiny one of it to CASES, VARIANTS or DISTILLED."""
    made = {type(case.pipe).__name__ for case in (*ALL.values(), *DISTILLED.values())}
    assert made == {name for adapter in ADAPTERS for name in adapter.pipelines}
    covered = {id(find(CASES[name].pipe)) for name in FIRST} | {id(find(case.pipe)) for case in DISTILLED.values()}
    assert covered == {id(adapter) for adapter in ADAPTERS}


@PIPELINES
def test_cfg_is_the_pipelines_own_and_the_pipeline_stays_as_it_was(name: str) -> None:
    case = ALL[name]
    before, cls = case(3.0), type(case.pipe)
    modules = [(m, dict(m.__dict__)) for m in case.pipe.components.values() if isinstance(m, torch.nn.Module)]
    with attach(case.pipe, "CFG(3.0)") as run:
        got = case(5.0)
    assert distance(got, before) < 1e-5
    assert run.nfe == [8, 8]
    with failing(denoisers(case.pipe)[0]), pytest.raises(RuntimeError, match="no memory"), attach(case.pipe, "CFG(3.0)") as run:
        case(5.0)
    assert run.nfe == []
    assert torch.equal(case(3.0), before), "the pipeline was changed"
    assert type(case.pipe) is cls
    assert all(m.__dict__ == attributes for m, attributes in modules)
    assert distance(case(1.0), before) > 1e-3, "guidance changes nothing here: the comparison says nothing"


@contextmanager
def failing(net: torch.nn.Module) -> Iterator[None]:
    """Inside, the second evaluation of the network fails: within the first step, if the pipeline calls it twice a step."""
    begun = 0

    def hook(*_: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 2:
            raise RuntimeError("no memory")

    layer = next(m for m in net.modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@PIPELINES
def test_a_branch_that_is_not_planned_costs_no_row(name: str) -> None:
    case, batch = ALL[name], 4 if name == "dit" else 2
    for guidance, rows in (("Interval(CFG(3.0), 1, 2, 'step')", [4, 8, 8, 4]), ("none", [4, 4, 4, 4])):
        with Rows(*denoisers(case.pipe)) as counted, attach(case.pipe, guidance) as run:
            got = case(2.0, batch=batch)
        assert counted.total == sum(run.nfe) == sum(rows) * batch // 4
        assert run.calls == len(counted.each)
        assert run.trace.column("rows") == [r * batch // 4 for r in rows]
    assert distance(got, case(1.0, batch=batch)) < 1e-5


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_pipeline_takes_guidance_without_an_unconditional_branch(name: str) -> None:
    case = DISTILLED[name]
    before = case(5.0)
    with Rows(case.pipe.unet) as counted, attach(case.pipe, "none") as run:
        got = case(5.0)
    assert distance(got, before) < 1e-5
    assert counted.each == [2] * run.nfe[0]
    with attach(case.pipe, "PAG(2.0)") as weakened:
        assert distance(case(5.0), before) > 1e-5
    assert weakened.nfe == [2 * n for n in run.nfe]
    message = (
        rf"CFG\(scale=3.0\) needs .*{type(case.pipe).__name__} has no unconditional branch: .*distilled.*Use a guidance that"
    )
    with attach(case.pipe, "CFG(3.0)"), pytest.raises(ValueError, match=message):
        case(5.0)
    assert torch.equal(case(5.0), before)


@FAMILIES
def test_samples_stop_one_by_one(name: str) -> None:
    """A sample that leaves guidance early is what it would be if both left it then."""
    case = CASES[name]
    with attach(case.pipe, "Adaptive(CFG(3.0), 2.0, measure='x0')") as run:
        case(2.0)
    mean = run.trace.column("agreement")[0]  # of two samples: one agrees more, one less
    with Rows(*denoisers(case.pipe)) as counted, attach(case.pipe, f"Adaptive(CFG(3.0), {mean}, measure='x0')") as run:
        got = case(2.0)
    assert run.nfe[0] != run.nfe[1]
    assert counted.total == sum(run.nfe)
    for k, rows in enumerate(run.nfe):
        with attach(case.pipe, f"Interval(CFG(3.0), 0, {rows - 5}, 'step')") as both:
            expected = case(2.0)
        assert both.nfe == [rows] * 2
        assert distance(got[k], expected[k]) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "flux", "wan", "z-image"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """With momentum, thresholds and a stop for each sample."""
    case = CASES[name]
    with attach(case.pipe, "APG(4.0, momentum=-0.5, threshold=5.0)") as run:
        pair = case(2.0)
        first = {key: value[:1] if isinstance(value, torch.Tensor | list) else value for key, value in case.inputs(2).items()}
        alone = case(2.0, batch=1, **first)
    assert run.nfe == [8, 8, 8]
    assert distance(alone, pair[:1]) < 1e-5


@pytest.mark.parametrize("name", [name for name in ALL if " control" in name])
def test_a_controlnet_saves_its_rows_too(name: str) -> None:
    case = ALL[name]
    with Rows(case.pipe.controlnet) as counted, attach(case.pipe, "Interval(CFG(3.0), 1, 2, 'step')"):
        case(2.0)
    assert counted.each == [2, 4, 4, 2]


def test_two_controlnets() -> None:
    case = CASES["sd control"]
    pipe = type(case.pipe)(**{**case.pipe.components, "controlnet": [case.pipe.controlnet] * 2}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    both = {"pipe": pipe, "image": [case.inputs(1)["image"]] * 2, "batch": 1, "controlnet_conditioning_scale": [0.5, 0.7]}
    own = case(3.0, **both)
    with Rows(pipe.controlnet) as counted, attach(pipe, "Interval(CFG(3.0), 1, 9, 'step')"):
        case(2.0, **both)
    assert counted.each == [1, 2, 2, 2]
    with attach(pipe, "CFG(3.0)"):
        assert distance(case(2.0, **both), own) < 1e-5


def test_a_controlnet_in_guess_mode_is_the_pipelines_own() -> None:
    case = CASES["sd control"]
    own = case(3.0, guess_mode=True)
    with attach(case.pipe, "CFG(3.0)"):
        got = case(2.0, guess_mode=True)
    assert distance(got, own) < 1e-5
    assert distance(own, case(3.0)) > 1e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd control", "pixart", "sana", "qwen", "z-image"])
def test_several_images_per_prompt(name: str) -> None:
    case = CASES[name]
    own = case(3.0, num_images_per_prompt=2)
    with attach(case.pipe, "CFG(3.0)") as run:
        got = case(2.0, num_images_per_prompt=2)
    assert len(got) == 4
    assert distance(got, own) < 1e-5
    assert run.nfe == [8] * 4


def test_qwen_and_lumina_keep_their_norm_matching() -> None:
    qwen, lumina = CASES["qwen"], CASES["lumina 2"]
    own = lumina(3.0, cfg_normalization=True)
    with attach(lumina.pipe, "CFG(3.0)"):
        got = lumina(2.0, cfg_normalization=True)
    assert distance(got, own) < 1e-5
    assert distance(own, lumina(3.0)) > 1e-3
    with attach(qwen.pipe, "ZeroInit(CFG(3.0), steps=1)") as run:  # the pipeline divides 0 by 0 where a prediction is 0
        zeroed = qwen(2.0)
    assert torch.isfinite(zeroed).all()
    assert run.trace.column("rows")[0] == 0


def test_wan_22_has_one_run_over_both_networks() -> None:
    case = CASES["wan 2.2"]
    with (
        Rows(case.pipe.transformer) as high,
        Rows(case.pipe.transformer_2) as low,
        attach(case.pipe, "APG(3.0, momentum=-0.9)") as run,
    ):
        got = case(2.0)
    assert sorted({*high.each, *low.each}) == [2]
    assert high.total > 0
    assert low.total > 0
    assert run.trace.column("step") == [0, 1, 2, 3]
    with attach(case.pipe, "APG(3.0)"):
        assert distance(case(2.0), got) > 1e-4, "momentum was lost at the switch"
