"""Every family of pipelines: guided as by itself, at exactly the planned rows, and untouched afterwards."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch

from genkit.pipelines.attach import attach
from genkit.pipelines.attach.adapters import ADAPTERS, find
from tests.attach.tiny import CASES, Rows, denoisers, distance

FAMILIES = pytest.mark.parametrize("name", CASES)


@FAMILIES
def test_cfg_is_the_pipelines_own_and_the_pipeline_stays_as_it_was(name: str) -> None:
    case = CASES[name]
    before, cls = case(3.0), type(case.pipe)
    modules = [(m, dict(m.__dict__)) for m in case.pipe.components.values() if isinstance(m, torch.nn.Module)]
    with attach(case.pipe, "CFG(3.0)") as run:
        got = case(5.0)
    assert distance(got, before) < 1e-5
    assert run.nfe == [8, 8]
    assert torch.equal(case(3.0), before), "the pipeline was changed"
    assert type(case.pipe) is cls
    assert all(m.__dict__ == attributes for m, attributes in modules)
    assert distance(case(1.0), before) > 1e-3, "guidance changes nothing here: the comparison says nothing"


@FAMILIES
def test_a_branch_that_is_not_planned_costs_no_row(name: str) -> None:
    case = CASES[name]
    for guidance, rows in (("Interval(CFG(3.0), 1, 2, 'step')", [4, 8, 8, 4]), ("none", [4, 4, 4, 4])):
        with Rows(*denoisers(case.pipe)) as counted, attach(case.pipe, guidance) as run:
            got = case(2.0, batch=4 if name == "dit" else 2)
        batch = 4 if name == "dit" else 2
        assert counted.total == sum(run.nfe) == sum(rows) * batch // 4
        assert run.calls == len(counted.each)
        assert run.trace.column("rows") == [r * batch // 4 for r in rows]
    assert distance(got, case(1.0, batch=batch)) < 1e-5


def test_every_adapter_is_tested() -> None:
    tested = {id(find(case.pipe)) for case in CASES.values()}
    left = [a.pipelines for a in ADAPTERS if id(a) not in tested]
    assert left == [("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")], left


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


@pytest.mark.parametrize("name", ["sd control", "sdxl control"])
def test_a_controlnet_saves_its_rows_too(name: str) -> None:
    case = CASES[name]
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


def test_several_images_per_prompt() -> None:
    for name in ("sdxl", "pixart"):
        case = CASES[name]
        own = case(3.0, num_images_per_prompt=2)
        with attach(case.pipe, "CFG(3.0)") as run:
            got = case(2.0, num_images_per_prompt=2)
        assert len(got) == 4
        assert distance(got, own) < 1e-5, name
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
