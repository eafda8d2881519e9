"""A guidance of genkit as the guider of a modular pipeline. Everything is tiny and random."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import (
    ClassifierFreeGuidance,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks

from genkit.guidance import Guidance
from genkit.pipelines.diffusers_pipeline import DiffusersPipeline
from genkit.pipelines.to_diffusers import GenkitGuider, to_diffusers
from tests.pipelines.tiny_diffusers import BETAS, sd3, sdxl

pytestmark = [pytest.mark.filterwarnings(f"ignore:__array_{name}:DeprecationWarning") for name in ("_", "wrap")]  # in diffusers
TEXT: dict[str, Any] = {
    "prompt": ["a cat", "fox"], "negative_prompt": ["dog", ""], "height": 16, "width": 16, "num_inference_steps": 6,
}  # fmt: skip


class Modular:
    """A modular pipeline with the parts of a standard one, and the rows of each call of its network."""

    def __init__(self, pipe: Any, blocks: Any) -> None:
        self.standard, self.pipe = pipe, blocks().init_pipeline()
        parts = {name: part for name, part in pipe.components.items() if part is not None}
        self.pipe.update_components(**{name: part for name, part in parts.items() if name in self.pipe._component_specs})
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    def run(self, guider: Any, **changes: Any) -> np.ndarray:
        self.pipe.update_components(guider=guider)
        options = {**TEXT, "generator": torch.Generator().manual_seed(0), **changes}
        return self.pipe(**options, output="images", output_type="np")

    def own(self, guidance: Guidance | str) -> Any:
        """What genkit's own loop makes of it."""
        return DiffusersPipeline(self.standard)(
            **TEXT, guidance=guidance, generator=torch.Generator().manual_seed(0), output_type="np"
        )


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def modular(request: pytest.FixtureRequest) -> Modular:
    if request.param == "sdxl":
        return Modular(sdxl(EulerDiscreteScheduler(**BETAS)), StableDiffusionXLAutoBlocks)
    return Modular(sd3(), StableDiffusion3AutoBlocks)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(a - b).max() < tolerance)


# ---- results ----


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cfg_is_the_pipelines_own_guider(modular: Modular, scale: float) -> None:
    wanted = modular.run(ClassifierFreeGuidance(guidance_scale=scale))
    guider = to_diffusers(scale)
    assert close(modular.run(guider), wanted)
    assert guider.ledger.nfe == [6 if scale == 1 else 12] * 2
    assert close(modular.run(to_diffusers(f"CFG({scale})", modular.scheduler)), wanted)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.4, 1.0)])
def test_gate_in_fractions_is_start_and_stop(modular: Modular, start: float, stop: float) -> None:
    wanted = modular.run(ClassifierFreeGuidance(guidance_scale=4.0, start=start, stop=stop))
    assert close(modular.run(to_diffusers(f"Interval(CFG(4.0), {start}, {stop}, 'fraction')")), wanted)


@pytest.mark.parametrize(
    "guidance",
    [
        "Interval(CFG(4.0), 0.7, 15.0)",
        "Scheduled(CFG(4.0), 'linear')",
        "Interval(APG(6.0, momentum=-0.5, threshold=2.0), 0.2, 9.0)",
        "CFGZeroStar(4.0)",
        "ZeroInit(CFG(3.0))",
        "Adaptive(CFG(6.0), 0.9)",
        "CFGPP(0.6, 'schedule')",
        "Piecewise((CFG(6.0), APG(3.0)), (1.0,))",
    ],
)
def test_guidance_does_in_a_modular_pipeline_what_it_does_in_the_loop(modular: Modular, guidance: str) -> None:
    wanted = modular.own(guidance)
    found = modular.run(to_diffusers(guidance, modular.scheduler))
    assert close(found, wanted.images, 2e-5)
    assert not close(found, modular.run(to_diffusers(1.0)), 1e-3)


def test_interval_saves_calls_of_the_network(modular: Modular) -> None:
    network = getattr(modular.pipe, "unet", None) or modular.pipe.transformer
    rows: list[int] = []
    watch = network.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    guider = to_diffusers("Interval(APG(4.0), 0.4, 3.0)", modular.scheduler)
    modular.run(guider)
    watch.remove()
    inside = sum(0.4 < sigma <= 3.0 for sigma in modular.own("Interval(APG(4.0), 0.4, 3.0)").trace.column("sigma"))
    assert 0 < inside < 6
    assert rows == [2] * (6 + inside)
    assert (guider.ledger.nfe, guider.ledger.calls) == ([6 + inside] * 2, 6 + inside)
    assert not network._forward_pre_hooks


def test_second_run_begins_anew_and_still_has_a_negative_prompt(modular: Modular) -> None:
    """A gate that is closed at the end of a run must not decide about the encoding in the next one."""
    guider = to_diffusers("Interval(APG(5.0, momentum=-0.7), 2, 4, 'step')", modular.scheduler)
    assert guider.num_conditions == 2
    first = modular.run(guider)
    assert guider.num_conditions == 2
    assert close(modular.run(guider), first)
    other = modular.run(guider, negative_prompt=["ox", "ox"])
    assert not close(other, first)
    assert close(
        modular.run(guider, prompt="a cat", negative_prompt="dog")[:1],
        modular.run(to_diffusers(guider.guidance, modular.scheduler), prompt="a cat", negative_prompt="dog"),
    )


def test_second_order_scheduler_keeps_the_gate_for_whole_steps() -> None:
    pipe = Modular(sdxl(HeunDiscreteScheduler(**BETAS)), StableDiffusionXLAutoBlocks)
    guider = to_diffusers("Interval(APG(4.0, momentum=-0.5), 0.5, 4.0)", pipe.scheduler)
    found, wanted = pipe.run(guider), pipe.own("Interval(APG(4.0, momentum=-0.5), 0.5, 4.0)")
    assert close(found, wanted.images, 2e-5)
    assert guider.ledger.nfe == wanted.nfe


def test_guider_of_a_second_network_counts_the_steps_of_the_run() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    scheduler._step_index = 4
    guider = to_diffusers("Interval(APG(3.0), 5, 5, 'step')", scheduler)
    planned = []
    for step in (4, 5):
        scheduler._step_index = step
        guider.set_state(step, 6, scheduler.timesteps[step])
        planned.append(len(guider.prepare_inputs({"e": (torch.zeros(2, 1), torch.ones(2, 1))})))
    assert planned == [1, 2]


# ---- the object ----


def test_configuration_is_the_expression(tmp_path: Path) -> None:
    scheduler = EulerDiscreteScheduler(**BETAS)
    guider = to_diffusers("Interval(APG(4.0), 0.28, 5.42)", scheduler)
    guider.save_pretrained(tmp_path)
    loaded = GenkitGuider.from_pretrained(tmp_path, scheduler=scheduler)
    assert loaded.guidance == guider.guidance
    assert guider.new(guidance="CFG(2.0)").scheduler is scheduler
    assert repr(guider).startswith("GenkitGuider")


def test_disabled_guider_evaluates_the_conditional_branch_alone(modular: Modular) -> None:
    guider = to_diffusers("APG(4.0)", modular.scheduler)
    guider.disable()
    assert guider.num_conditions == 1
    guider.set_state(0, 2, modular.scheduler.timesteps[0])
    inputs = guider.prepare_inputs({"e": (torch.zeros(2, 1), torch.ones(2, 1))})
    assert len(inputs) == 1
    inputs[0].noise_pred = torch.ones(2, 4)
    assert torch.equal(guider(inputs).pred, torch.ones(2, 4))


def test_fields_of_a_block_state_are_read_by_name() -> None:
    guider = to_diffusers(3.0)
    guider.set_state(0, 2, torch.tensor(999.0))
    state = SimpleNamespace(prompt=torch.zeros(2, 1), negative=torch.ones(2, 1), shared=torch.full((2, 1), 7.0))
    fields = {"text": ("prompt", "negative"), "both": "shared", "absent": ("no_prompt", "no_negative")}
    batches = guider.prepare_inputs_from_block_state(state, fields)
    assert [float(batch.text[0]) for batch in batches] == [0.0, 1.0]
    assert [float(batch.both[0]) for batch in batches] == [7.0, 7.0]
    for value, batch in enumerate(batches):
        guider.prepare_models(torch.nn.Identity())
        assert guider.is_conditional == (value == 0)
        batch.noise_pred = torch.full((2, 4), float(value))
    assert torch.equal(guider(batches).pred, torch.full((2, 4), -2.0))  # 0 + (3 - 1)(0 - 1)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ("APG(4.0)", "scheduler=None, but APG.* needs clean-image estimates"),
        ("Scheduled(Adaptive(CFG(3.0)), 'linear')", "needs clean-image estimates"),
        ("Interval(CFG(3.0), 0.28, 5.42)", "scheduler=None, but Interval.* needs the noise level"),
        ("PAG(3.0)", "needs perturb, which a guider does not have"),
        ("CFGPP(0.6)", "needs direction, which a guider does not have"),
        ("CFG(3", "is not an expression"),
    ],
)
def test_guidance_that_a_guider_cannot_do_is_refused(guidance: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_diffusers(guidance)


def test_scheduler_that_cannot_be_read_is_refused() -> None:
    from diffusers import EDMEulerScheduler

    pipe = Modular(sdxl(EulerDiscreteScheduler(**BETAS)), StableDiffusionXLAutoBlocks)
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot be used"):
        to_diffusers("APG(4.0)", EDMEulerScheduler())
    other = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    other.set_timesteps(6)
    with pytest.raises(ValueError, match="give to_diffusers the scheduler object that the pipeline uses"):
        pipe.run(to_diffusers("APG(4.0)", other))


def test_branches_that_a_pipeline_cannot_evaluate_are_refused(modular: Modular) -> None:
    with pytest.raises(ValueError, match="asks for the model 'weak', which a guider cannot evaluate"):
        modular.run(to_diffusers("Autoguidance(2.0)", modular.scheduler))
    guider = to_diffusers(3.0)
    guider.set_state(0, 2, torch.tensor(999.0))
    for lone in ({"e": torch.zeros(2, 1)}, {"e": (torch.zeros(2, 1), None)}):
        with pytest.raises(ValueError, match="no unconditional inputs: pass negative_prompt=''"):
            guider.prepare_inputs(lone)


def test_input_that_is_not_the_image_alone_is_refused(modular: Modular) -> None:
    guider = to_diffusers("APG(4.0)", modular.scheduler)
    modular.scheduler.set_timesteps(2)
    guider.set_state(0, 2, modular.scheduler.timesteps[0])
    batches = guider.prepare_inputs({"e": (torch.zeros(2, 1), torch.ones(2, 1))})
    network = torch.nn.Identity()
    for batch in batches:
        guider.prepare_models(network)
        batch.noise_pred = network(torch.zeros(2, 9, 8, 8))[:, :4]
        guider.cleanup_models(network)
    with pytest.raises(
        ValueError, match=r"this network's input is of shape \(2, 9, 8, 8\), not the noisy image alone \(2, 4, 8, 8\)"
    ):
        guider(batches)
