"""A diffusers model in genkit's own loop, against the diffusers pipeline itself. Everything is tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

import genkit
from genkit.guidance import COND, Branch, Guidance, Result, StepInfo
from genkit.guidance.base import Predictions
from genkit.pipelines.course import Course
from genkit.pipelines.diffusers_denoiser import DiffusersDenoiser
from genkit.pipelines.diffusers_pipeline import DiffusersOutput, DiffusersPipeline
from tests.pipelines.tiny_diffusers import BETAS, dit, pixart, sd3, sd15, sdxl

TEXT: dict[str, Any] = {"prompt": ["a cat", "fox"], "height": 16, "width": 16, "num_inference_steps": 4}
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "sd15": (sd15, {**TEXT, "negative_prompt": ["dog", ""]}, {}),
    "sdxl": (sdxl, {**TEXT, "negative_prompt": ["dog", ""]}, {}),
    "sdxl, no negative": (sdxl, {**TEXT, "width": 24}, {}),
    "sd3": (sd3, {**TEXT, "negative_prompt": ["dog", ""]}, {}),
    "pixart": (pixart, {**TEXT, "negative_prompt": "dog", "clean_caption": False}, {"use_resolution_binning": False}),
    "dit": (dit, {"class_labels": [3, 1], "num_inference_steps": 4}, {}),
}
PLAIN = {**BETAS, "clip_sample": False}


pytestmark = [pytest.mark.filterwarnings(f"ignore:__array_{name}:DeprecationWarning") for name in ("_", "wrap")]  # in diffusers


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def pair(pipe: Any, sampler: str = "bridge", steps: int = 5) -> tuple[DiffusersOutput, Tensor]:
    """Latents from genkit and from the pipeline itself, for one generator."""
    options = {**TEXT, "num_inference_steps": steps, "output_type": "latent"}
    wanted = pipe(**options, guidance_scale=4.0, generator=seed()).images
    found = DiffusersPipeline(pipe)(**options, guidance="CFG(4.0)", generator=seed(), sampler=sampler)
    assert isinstance(found, DiffusersOutput)
    return found, wanted


# ---- the pipeline's own result ----


@pytest.mark.parametrize("name", FAMILIES)
def test_family_gives_the_images_of_its_own_pipeline(name: str) -> None:
    build, options, own = FAMILIES[name]
    pipe = build()
    wanted = pipe(**options, **own, guidance_scale=5.0, generator=seed(), output_type="np").images
    found = DiffusersPipeline(pipe)(**options, guidance=5.0, generator=seed(), output_type="np")
    assert wanted.std() > 0.05
    np.testing.assert_allclose(found.images, wanted, atol=1e-5)
    assert (found.nfe, found.calls) == ([8, 8], 4)


@pytest.mark.parametrize("name", ["sd15", "dit"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.0])
def test_guidance_scale_is_read_as_diffusers_reads_it(name: str, scale: float | None) -> None:
    build, options, own = FAMILIES[name]
    pipe = build()
    chosen = {} if scale is None else {"guidance_scale": scale}
    wanted = pipe(**options, **own, **chosen, generator=seed(), output_type="np").images
    found = DiffusersPipeline(pipe)(**options, **chosen, generator=seed(), output_type="np")
    np.testing.assert_allclose(found.images, wanted, atol=1e-5)
    assert found.nfe == ([8, 8] if scale is None else [4, 4])


VP_SCHEDULERS = [
    DDIMScheduler(**PLAIN, set_alpha_to_one=False),
    DDIMScheduler(**PLAIN, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    DDPMScheduler(**PLAIN),
    EulerDiscreteScheduler(**BETAS),
    EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, prediction_type="v_prediction"),
    EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    HeunDiscreteScheduler(**BETAS),
    DPMSolverMultistepScheduler(**BETAS),
    UniPCMultistepScheduler(**BETAS),
    LMSDiscreteScheduler(**BETAS),
    PNDMScheduler(**BETAS, skip_prk_steps=True),
]
FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
]


@pytest.mark.parametrize("scheduler", VP_SCHEDULERS + FLOW_SCHEDULERS, ids=lambda s: type(s).__name__)
def test_bridge_is_the_pipelines_own_scheduler(scheduler: Any) -> None:
    found, wanted = pair((sd3 if scheduler in FLOW_SCHEDULERS else sd15)(scheduler))
    assert distance(found.images, wanted) < 2e-5


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("euler", EulerDiscreteScheduler(**BETAS)),
        ("euler", EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", use_karras_sigmas=True)),
        ("ddim", DDIMScheduler(**PLAIN, set_alpha_to_one=False)),
        ("ddim(eta=1.0)", DDPMScheduler(**PLAIN)),
        ("euler_ancestral", EulerAncestralDiscreteScheduler(**BETAS)),
        ("heun", HeunDiscreteScheduler(**BETAS)),
        ("dpmpp_2m", DPMSolverMultistepScheduler(**BETAS)),
        ("flow_euler", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("flow_heun", FlowMatchHeunDiscreteScheduler(shift=3.0)),
    ],
)
def test_own_sampler_gives_what_the_scheduler_of_its_name_gives(sampler: str, scheduler: Any) -> None:
    found, wanted = pair((sd3 if sampler.startswith("flow") else sd15)(scheduler), sampler)
    assert distance(found.images, wanted) < 2e-5


def test_latents_and_several_images_per_prompt() -> None:
    pipe, noise = sd15(), torch.randn(4, 4, 8, 8, generator=seed())
    options = {**TEXT, "num_images_per_prompt": 2, "latents": noise, "output_type": "latent"}
    wanted = pipe(**options, guidance_scale=3.0).images
    assert distance(DiffusersPipeline(pipe)(**options, guidance=3.0).images, wanted) < 1e-5


def test_one_generator_per_image() -> None:
    pipe = sdxl(EulerAncestralDiscreteScheduler(**BETAS))
    wanted = pipe(**TEXT, guidance_scale=3.0, generator=[seed(3), seed(4)], output_type="latent").images
    found = DiffusersPipeline(pipe)(**TEXT, guidance=3.0, generator=[seed(3), seed(4)], output_type="latent")
    assert distance(found.images, wanted) < 1e-5


# ---- the denoiser ----


def denoiser(scheduler: Any, steps: int = 7) -> DiffusersDenoiser:
    scheduler.set_timesteps(steps)
    return DiffusersDenoiser(sd15().unet, Course(scheduler, (1.0, 0.0), scheduler.timesteps[0], None), (2, 4, 8, 8))


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler(**BETAS), DDIMScheduler(**PLAIN), UniPCMultistepScheduler(**BETAS)], ids=["e", "d", "u"]
)
def test_noise_levels_have_the_timesteps_of_the_scheduler(scheduler: Any) -> None:
    made, table = denoiser(scheduler), scheduler.alphas_cumprod.double()
    visited = [made.course.timestep(place.level) for place in made.course.places]
    assert visited == scheduler.timesteps.tolist()
    trained = [made.course.timestep(float((1 / table[t] - 1).sqrt())) for t in (0, 1, 17, 500, 998, 999)]
    np.testing.assert_allclose(trained, [0, 1, 17, 500, 998, 999], atol=1e-3)
    between = [made.course.timestep(sigma) for sigma in np.geomspace(0.03, 14.0, 50)]
    assert between == sorted(between)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_estimate_is_the_schedulers_own(prediction: str) -> None:
    scheduler = DDIMScheduler(**PLAIN, prediction_type=prediction)
    made = denoiser(scheduler)
    x, condition = torch.randn(2, 4, 8, 8, generator=seed()), {"encoder_hidden_states": torch.randn(2, 5, 16, generator=seed())}
    places = made.course.places[1:3]
    wanted = []
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps[1:3]):
            raw = made.network(x, t, **condition).sample
            wanted.append(scheduler.step(raw, t, x).pred_original_sample[i])
        levels = torch.tensor([place.level for place in places], dtype=torch.float64)
        found = made(x, levels, condition)  # each row at its own level
    assert distance(found, torch.stack(wanted)) < 1e-5


# ---- guidance ----


@pytest.fixture(scope="module")
def own() -> DiffusersPipeline:
    return DiffusersPipeline(sd15(EulerDiscreteScheduler(**BETAS)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_rule_that_is_not_affine_sees_clean_images(prediction: str) -> None:
    """APG without its parallel part, in x0 space, written out over DDIM steps."""
    pipe = sd15(DDIMScheduler(**PLAIN, prediction_type=prediction))
    found = DiffusersPipeline(pipe)(**TEXT, guidance="APG(6.0)", generator=seed(), output_type="latent").images

    pipe.scheduler.set_timesteps(4)
    cond, uncond = pipe.encode_prompt(TEXT["prompt"], "cpu", 1, True)
    x = torch.randn(2, 4, 8, 8, generator=seed())
    steps = pipe.scheduler.timesteps.tolist()
    with torch.no_grad():
        for t, after in zip(steps, [*steps[1:], None], strict=True):
            abar = float(pipe.scheduler.alphas_cumprod[t])
            a, s = abar**0.5, (1 - abar) ** 0.5
            raw = [pipe.unet(x, t, encoder_hidden_states=e).sample for e in (cond, uncond)]
            c, u = [(x - s * r) / a if prediction == "epsilon" else a * x - s * r for r in raw]
            across, along = (c - u).flatten(1), c.flatten(1)
            across = across - along * (across * along).sum(1, True) / along.square().sum(1, True)
            denoised = c + 5 * across.reshape(c.shape)
            abar = 1.0 if after is None else float(pipe.scheduler.alphas_cumprod[after])
            x = abar**0.5 * denoised + (1 - abar) ** 0.5 * (x - a * denoised) / s
    assert distance(found, x) < 1e-4


def test_interval_evaluates_only_what_it_needs(own: DiffusersPipeline) -> None:
    rows: list[int] = []
    watch = own.network.register_forward_hook(lambda network, args, out: rows.append(len(args[0])))
    try:
        out = own(**{**TEXT, "num_inference_steps": 6}, guidance="Interval(CFG(5.0), 0.4, 3.0)")
    finally:
        watch.remove()
    inside = [0.4 < sigma <= 3.0 for sigma in out.trace.column("sigma")]
    assert 0 < sum(inside) < 6
    assert rows == [4 if active else 2 for active in inside]
    assert out.nfe == [6 + sum(inside)] * 2
    assert out.calls == 6


def test_weakened_network_is_that_of_diffusers_own_pipeline(own: DiffusersPipeline) -> None:
    parts = {**own.components, "scheduler": EulerDiscreteScheduler(**BETAS)}
    theirs = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    theirs.set_progress_bar_config(disable=True)
    processors = own.network.attn_processors
    options = {**TEXT, "generator": seed(), "output_type": "latent"}
    wanted = theirs(**options, guidance_scale=3.0, pag_scale=2.0).images
    own.network.set_attn_processor(processors)
    found = own(**{**options, "generator": seed()}, guidance="Sum(CFG(3.0), PAG(3.0))")
    assert distance(found.images, wanted) < 1e-5
    assert distance(found.images, own(**{**options, "generator": seed()}, guidance=3.0).images) > 1e-3
    assert (found.nfe, found.calls) == ([12, 12], 8)


def test_weak_model_becomes_a_denoiser(own: DiffusersPipeline) -> None:
    plain = own(**TEXT, guidance=1.0, output_type="latent")
    same = own(**TEXT, guidance="Autoguidance(3.0)", models={"weak": own.network}, output_type="latent")
    assert distance(same.images, plain.images) < 1e-5
    assert same.nfe == [2 * n for n in plain.nfe]


def test_negative_prompt_is_a_branch_of_its_own_name_too(own: DiffusersPipeline) -> None:
    @dataclass(frozen=True)
    class _Away(Guidance):
        """Twice away from the negative prompt."""

        def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
            return COND, Branch("negative", condition="negative")

        def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
            return Result(2 * predictions["cond"] - predictions["negative"]), state

    options = {**TEXT, "output_type": "latent"}
    away = own(**options, negative_prompt="dog", guidance=_Away()).images
    assert distance(away, own(**options, negative_prompt=["dog", "dog"], guidance=2.0).images) < 1e-5
    assert distance(away, own(**options, guidance=2.0).images) > 1e-3
    with pytest.raises(ValueError, match="asks for the 'negative' branch"):
        own(**options, guidance=_Away())


def test_class_names_are_labels() -> None:
    pipe = DiffusersPipeline(dit())
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    named = pipe(**options, class_labels=["goldfish", "Tinca tinca"]).images
    assert torch.equal(named, pipe(**options, class_labels=torch.tensor([1, 0])).images)
    assert distance(pipe(**options, class_labels="goldfish").images, named[:1]) < 1e-5


# ---- random numbers ----


def test_image_of_a_seed_does_not_depend_on_its_batch(own: DiffusersPipeline) -> None:
    options: dict[str, Any] = {**TEXT, "sampler": "euler_ancestral", "guidance": 3.0, "output_type": "latent"}
    both = own(**options, seeds=[5, 9]).images
    alone = own(**{**options, "prompt": "fox"}, seeds=[9]).images
    assert distance(alone, both[1:]) < 1e-5
    default, again = own(**options).images, own(**options, seeds=[0, 1]).images
    assert torch.equal(default, again)
    assert not torch.equal(default, both)


def test_scheduler_of_the_pipeline_is_not_touched() -> None:
    pipe = sd15(DDPMScheduler(**PLAIN))
    state = torch.random.get_rng_state()
    first, second = (DiffusersPipeline(pipe)(**TEXT, output_type="latent").images for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    assert pipe.scheduler.num_inference_steps is None


# ---- callbacks and output ----


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(**BETAS), DDIMScheduler(**PLAIN)], ids=["ve", "vp"])
@pytest.mark.parametrize("sampler", ["bridge", "euler"])
def test_callback_sees_and_changes_what_it_does_in_diffusers(scheduler: Any, sampler: str) -> None:
    pipe = sd15(scheduler)

    def recorder(log: list[Any]) -> Callable[..., dict[str, Any]]:
        def callback(given: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            assert given is pipe
            log.append((step, float(timestep), values["latents"].clone()))
            return {"latents": values["latents"] * 0.9} if step == 1 else values

        return callback

    theirs: list[Any] = []
    mine: list[Any] = []
    wanted = pipe(**TEXT, guidance_scale=3.0, generator=seed(), callback_on_step_end=recorder(theirs), output_type="latent")
    out = DiffusersPipeline(pipe)(
        **TEXT, guidance=3.0, generator=seed(), callback_on_step_end=recorder(mine), sampler=sampler, output_type="latent"
    )
    assert [m[:2] for m in mine] == [t[:2] for t in theirs]
    assert all(distance(m[2], t[2]) < 1e-5 for m, t in zip(mine, theirs, strict=True))
    assert distance(out.images, wanted.images) < 1e-5


@pytest.mark.parametrize("sampler", ["bridge", "heun"])
def test_callback_of_the_loop_sees_what_the_network_believes(own: DiffusersPipeline, sampler: str) -> None:
    seen: list[Any] = []
    out = own(**TEXT, guidance=3.0, sampler=sampler, callback=lambda info, result: seen.append((info.index, result)))
    assert [index for index, _ in seen] == [0, 1, 2, 3] == [row["step"] for row in out.trace.rows if row["stage"] == "step"]
    shown = own.decode(seen[-1][1].denoised, "np")
    wanted = own(**TEXT, guidance=3.0, sampler=sampler, output_type="np").images
    np.testing.assert_allclose(shown, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="output_type='jpg'"):
        own.decode(seen[-1][1].denoised, "jpg")
    with pytest.raises(ValueError, match="NaN"):
        own.decode(seen[-1][1].denoised * np.nan)


def test_callback_can_end_the_run(own: DiffusersPipeline) -> None:
    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> None:
        pipe._interrupt = step == 1

    assert own(**TEXT, guidance=3.0, callback_on_step_end=stop).calls == 2
    assert own(**TEXT, guidance=3.0).calls == 4


def test_output_types(own: DiffusersPipeline) -> None:
    out = {kind: own(**TEXT, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert [image.size for image in out["pil"].images] == [(16, 16)] * 2
    assert out["np"].images.shape == (2, 16, 16, 3)
    assert out["pt"].images.shape == (2, 3, 16, 16)
    assert out["latent"].images.shape == (2, 4, 8, 8)
    np.testing.assert_array_equal(np.asarray(out["pil"][0][0]), (out["np"].images[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(out["np"].images, out["pt"].images.permute(0, 2, 3, 1).numpy())
    images = own(**TEXT, output_type="np", return_dict=False)
    assert len(images) == 1
    np.testing.assert_array_equal(images[0], out["np"].images)
    assert len(out["pil"].trace) == 4


def test_latents_that_are_not_finite_are_reported(own: DiffusersPipeline) -> None:
    def spoil(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * float("nan")}

    with pytest.raises(ValueError, match="NaN or infinity"):
        own(**TEXT, callback_on_step_end=spoil)


def test_flagged_images_are_black() -> None:
    pipe = sd15()
    pipe.run_safety_checker = lambda image, device, dtype: (
        torch.where(torch.tensor([True, False])[:, None, None, None], 0, image),
        [True, False],
    )
    black, shown = DiffusersPipeline(pipe)(**TEXT, output_type="np").images
    assert black.max() == 0
    assert shown.std() > 0.05


# ---- loading ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    dit().save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_folder_of_diffusers_is_loaded(folder: Path) -> None:
    options: dict[str, Any] = {"class_labels": [1, 0], "num_inference_steps": 2, "output_type": "np"}
    wanted = DiffusersPipeline(dit())(**options).images
    loaded = genkit.load(folder)
    assert isinstance(loaded, DiffusersPipeline)
    assert set(loaded.components) == {"transformer", "vae", "scheduler"}
    np.testing.assert_allclose(loaded(**options).images, wanted, atol=1e-6)
    half = DiffusersPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.network.dtype == torch.bfloat16
    np.testing.assert_allclose(half(**options).images, wanted, atol=0.1)
    assert half.to(torch.float32).network.dtype == torch.float32


@pytest.mark.parametrize("build", [sd15, sdxl, sd3, pixart], ids=lambda build: build.__name__)
def test_saved_pipeline_with_a_text_encoder_is_loaded(build: Callable[[], Any], tmp_path: Path) -> None:
    pipe, options = build(), {**TEXT, "num_inference_steps": 2, "output_type": "latent"}
    options |= {"clean_caption": False} if build is pixart else {}
    pipe.save_pretrained(tmp_path)
    without = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told what is missing
    loaded = DiffusersPipeline.from_pretrained(tmp_path, **without) if build is sd3 else genkit.load(tmp_path)
    assert distance(loaded(**options).images, DiffusersPipeline(pipe)(**options).images) < 1e-5


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "CFGG(3.0)"}, "unknown name 'CFGG'; did you mean CFG"),
        ({"guidance": [3.0]}, "must be a guidance object, an expression"),
        ({"guidance": 3.0, "guidance_scale": 2.0}, "give one of them"),
        ({"guidance_scale": "CFG(3.0)"}, "guidance_scale='CFG\\(3.0\\)' must be a number"),
        ({"guidance": "Autoguidance(2.0)"}, "asks for the model 'weak'; this run has main"),
        ({"guidance": "CADS(CFG(3.0))", "generator": seed()}, "seeds=None, but .* draws random numbers"),
        ({"guidance": "CFGPP(0.6)"}, "has no direction, which CFGPP.* needs; use one of euler"),
        ({"sampler": "eulr"}, "did you mean euler.*or 'bridge', the pipeline's own scheduler"),
        ({"grid": "karras"}, "grid='karras' needs a sampler of genkit"),
        ({"sampler": "euler", "grid": "karas"}, "grid='karas' is unknown; use one of karras"),
        ({"sampler": "euler", "grid": [1.0, 2.0]}, "strictly falling"),
        ({"class_labels": [1]}, "StableDiffusionPipeline takes a prompt, not class_labels"),
        ({"prompt": None}, "StableDiffusionPipeline needs a prompt"),
        ({"prompt": []}, "must be a text or a list of texts"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer from 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be an integer from 1"),
        ({"height": 17}, "height=17 must be a multiple of 2"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 texts for 2 prompts"),
        ({"seeds": [1]}, "seeds has 1 entries for 2 images"),
        ({"seeds": [1, 2], "generator": seed()}, "generator and seeds are both given"),
        ({"generator": [seed()] * 3}, "generator has 3 entries for 2 images"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, r"latents has shape \(2, 4, 4, 4\), but this call needs \(2, 4, 8, 8\)"),
        ({"output_type": "jpg"}, "output_type='jpg' must be one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"only \['latents'\] can be had"),
    ],
)
def test_argument_that_does_not_fit_is_named(own: DiffusersPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(**{**TEXT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cat"}, "DiTPipeline takes class_labels, not prompt"),
        ({"class_labels": [1], "negative_prompt": "x"}, "DiTPipeline takes class_labels, not negative_prompt"),
        ({}, "DiTPipeline needs class_labels"),
        ({"class_labels": [1000]}, "class_labels contains 1000: use an index from 0 to 999, or one of the 3 names"),
        ({"class_labels": "cat"}, "class_labels contains 'cat'"),
        ({"class_labels": [1], "height": 32}, "height=32 must be 16, the only size"),
    ],
)
def test_class_labels_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusersPipeline(dit())(**options)


def test_argument_that_nobody_knows_is_named(own: DiffusersPipeline) -> None:
    with pytest.raises(
        TypeError, match=r"unknown argument num_inference_step; beside its own, DiffusersPipeline takes .*clip_skip"
    ):
        own("a cat", num_inference_step=3)


def test_models_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipe is a str; DiffusersPipeline runs StableDiffusionPipeline, .*genkit\.attach"):
        DiffusersPipeline("some/folder")
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot be used: it applies c_skip"):
        DiffusersPipeline(sdxl(EDMEulerScheduler()))(**TEXT)
    with pytest.raises(ValueError, match=r"grid='karras' does not fit this model .*sigma_max=inf.*use 'uniform_t'"):
        DiffusersPipeline(sd3())(**TEXT, sampler="heun", grid="karras")
    pipe = dit()
    pipe.transformer.train()
    with pytest.raises(ValueError, match=r"training mode.*call pipe\.transformer\.eval"):
        DiffusersPipeline(pipe)(class_labels=[0])
    pipe = sd15()
    network = pipe.unet
    pipe.unet = type(network).from_config(network.config, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="nothing left to guide"):
        DiffusersPipeline(pipe)
