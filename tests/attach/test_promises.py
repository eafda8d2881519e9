"""What the docstring of attach promises, beside guidance itself: its arguments, its record, how a pipeline may be called."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import Tensor

from genkit.guidance import CFG
from genkit.guidance.none import NoGuidance
from genkit.noise import VP
from genkit.pipelines.attach import attach
from tests.attach.test_families import FAMILIES
from tests.attach.tiny import CASES, SIZE, Rows, distance, randn, sd

SD = CASES["sd"]


def guided(name: str, guidance: Any, scale: float = 2.0, **options: Any) -> tuple[Tensor, Any]:
    with attach(CASES[name].pipe, guidance, **options) as run:
        return CASES[name](scale), run


@FAMILIES
def test_the_size_of_the_pipelines_own_scale_has_no_effect(name: str) -> None:
    """Bit for bit: what the pipeline combines are two equal predictions."""
    assert torch.equal(guided(name, "APG(3.0)", 1.25)[0], guided(name, "APG(3.0)", 64.0)[0])


def test_a_guidance_is_given_in_any_of_its_forms() -> None:
    first = guided("sd", CFG(3.0))[0]
    for same in ("CFG(3.0)", 3.0, 3):
        assert torch.equal(guided("sd", same)[0], first)
    for none in (None, "none", NoGuidance(), 1.0):
        got, run = guided("sd", none)
        assert distance(got, SD(1.0)) < 1e-5
        assert run.nfe == [4, 4]
    with pytest.raises(ValueError, match="CFGG"), attach(SD.pipe, "CFGG(3.0)"):
        pass


@FAMILIES
def test_trace(name: str) -> None:
    got, basic = guided(name, "Interval(CFG(3.0), 1, 2, 'step')")
    assert basic.trace.column("branches") == ["cond", "cond+uncond", "cond+uncond", "cond"]
    assert basic.trace.column("weight") == [1, 3, 3, 1]
    full, measured = guided(name, "Interval(CFG(3.0), 1, 2, 'step')", trace="full")
    assert distance(full, got) < 1e-5
    assert [c is not None for c in measured.trace.column("cosine")] == [False, True, True, False]
    assert all(-1 <= c <= 1 for c in measured.trace.column("cosine")[1:3])
    silent, nothing = guided(name, "Interval(CFG(3.0), 1, 2, 'step')", trace="none")
    assert torch.equal(silent, got)
    assert nothing.trace.rows == []
    assert nothing.nfe == measured.nfe == [6, 6]


class Speaking(diffusers.StableDiffusionPipeline):
    """Encodes a prompt as noise from its length."""

    def encode_prompt(
        self, prompt: Any, device: Any, images: int, doubled: bool, negative: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        def encoded(words: Any, embeds: Any) -> Tensor:
            words = [words] * len(prompt) if isinstance(words, str) else words
            return torch.cat([randn(1, 5, 12, seed=len(w)) for w in words]) if embeds is None else embeds

        return encoded(prompt, options["prompt_embeds"]), encoded(negative or "", options["negative_prompt_embeds"])


def speak(pipe: Any, *args: Any, scale: float = 3.0, **options: Any) -> Tensor:
    arguments = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 2, "output_type": "latent"}
    out = pipe(*args, **{**arguments, "guidance_scale": scale, **options})
    return out[0] if isinstance(out, tuple) else out.images


def speaking() -> Any:
    pipe = sd(unet=SD.pipe.unet)
    pipe.__class__ = Speaking
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_negative_prompt_is_that_of_calls_that_give_none() -> None:
    pipe, prompts, embeds = speaking(), ["a fox", "a hound"], randn(2, 5, 12, seed=9)
    expected = {n: speak(pipe, prompts, negative_prompt=n) for n in ("", "blurry", "dark and grey")}
    of_embeds = speak(pipe, prompts, negative_prompt_embeds=embeds)
    with attach(pipe, 3.0, negative="blurry"):
        assert distance(speak(pipe, prompts), expected["blurry"]) < 1e-5
        assert distance(speak(pipe, prompts, negative_prompt="dark and grey"), expected["dark and grey"]) < 1e-5
        assert distance(speak(pipe, prompts, negative_prompt_embeds=embeds), of_embeds) < 1e-5
    with attach(pipe, 3.0, ["blurry", "dark and grey"]):
        both = speak(pipe, prompts)
    assert distance(both[0], expected["blurry"][0]) < 1e-5
    assert distance(both[1], expected["dark and grey"][1]) < 1e-5
    with attach(pipe, 3.0):
        assert distance(speak(pipe, prompts), expected[""]) < 1e-5
    assert min(distance(expected[""], other) for other in (expected["blurry"], expected["dark and grey"], of_embeds)) > 1e-3


def test_a_pipeline_is_called_as_ever() -> None:
    pipe = speaking()
    own = speak(pipe, ["a fox"])
    with attach(pipe, "CFG(3.0)"):
        assert distance(speak(pipe, ["a fox"], SIZE, SIZE), own) < 1e-5
        assert distance(speak(pipe, ["a fox"], return_dict=False), own) < 1e-5
        with torch.inference_mode():
            assert distance(speak(pipe, ["a fox"]), own) < 1e-5


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_a_callback_may_stop_the_pipeline(name: str) -> None:
    def stop(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        pipe._interrupt = step == 1
        return tensors

    case = CASES[name]
    own = case(3.0, callback_on_step_end=stop)
    with attach(case.pipe, "CFG(3.0)") as run:
        got = case(2.0, callback_on_step_end=stop)
    assert distance(got, own) < 1e-5
    assert run.nfe == [4, 4]


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "qwen"])
@pytest.mark.parametrize("way", ["replaced", "in place"])
def test_a_callback_may_change_the_condition(name: str, way: str) -> None:
    def change(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        embeds = tensors["prompt_embeds"]
        other = embeds.roll(1, -1)
        return {"prompt_embeds": other if way == "replaced" else embeds.copy_(other)}

    case, options = CASES[name], {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "callback_on_step_end": change}
    own = case(3.0, **options)
    assert distance(own, case(3.0)) > 1e-3
    for guidance in ("CFG(3.0)", "APG(3.0, eta=1.0)"):
        with attach(case.pipe, guidance):
            assert distance(case(2.0, **options), own) < 1e-5


def test_a_model_of_another_class_is_called_as_a_denoiser() -> None:
    calls: list[tuple[Any, ...]] = []

    class Nothing:
        path = VP

        def __call__(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
            calls.append((x.shape, float(sigma[0]), sorted(condition)))
            return torch.zeros_like(x)

    with Rows(SD.pipe.unet) as counted:
        _, run = guided("sd", "Autoguidance(3.0)", models={"weak": Nothing()})
    assert counted.each == [2] * 4
    assert [shape for shape, *_ in calls] == [(2, 4, SIZE, SIZE)] * 4
    assert [sigma for _, sigma, _ in calls] == pytest.approx(run.trace.column("sigma"))
    assert all(keys == ["encoder_hidden_states"] for *_, keys in calls)
    assert run.nfe == [8, 8]
    with pytest.raises(ValueError, match="'weak'"):
        guided("sd", "Autoguidance(3.0)")


def test_seeds_are_the_same_for_every_call() -> None:
    with attach(SD.pipe, "CADS(CFG(3.0))", seeds=[5, 6]) as run:
        first, again = SD(2.0), SD(2.0)
    assert torch.equal(first, again)
    assert run.nfe == [8] * 4
    exchanged, _ = guided("sd", "CADS(CFG(3.0))", seeds=[6, 5])
    assert distance(exchanged, first) > 1e-4
    with attach(SD.pipe, "CADS(CFG(3.0))", seeds=[5]), pytest.raises(ValueError, match="seeds"):
        SD(2.0)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "wan", "z-image"])
def test_half_precision(name: str) -> None:
    """In bfloat16 the guided prediction is as near to float32 as the pipeline's own."""
    case = CASES[name]
    exact, pipe = case(3.0), copy.deepcopy(case.pipe).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)

    def half(value: Any) -> Any:
        if isinstance(value, list):
            return [half(item) for item in value]
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = {key: half(value) for key, value in case.inputs(2).items()}
    own = case(3.0, pipe=pipe, **inputs)
    with attach(pipe, "CFG(3.0)"):
        got = case(2.0, pipe=pipe, **inputs)
    assert got.dtype == own.dtype
    assert distance(got.float(), exact) < 1.5 * distance(own.float(), exact)
