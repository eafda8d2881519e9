"""Guidances that need more than two branches of a pipeline: weakened and weaker networks, gradients, noise, transforms."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from torch import Tensor

from genkit.guidance.base import Perturbation
from genkit.pipelines.attach import attach
from genkit.pipelines.attach.perturb import weaken
from tests.attach.tiny import CASES, Rows, distance, lively, randn, unet


def run(name: str, guidance: str, **options: Any) -> tuple[Tensor, Any]:
    case = CASES[name]
    with attach(case.pipe, guidance, **options) as made:
        out = case(2.0)
    return out, made


@pytest.mark.parametrize("name", ["sd", "flux", "z-image"])
def test_combinators(name: str) -> None:
    plain, _ = run(name, "CFG(3.0)")
    same, _ = run(name, "Scheduled(Adaptive(APG(3.0, eta=1.0), 2.0), 'constant')")
    assert distance(same, plain) < 1e-5
    _, adaptive = run(name, "Adaptive(CFG(3.0), -1.0)")  # stops after the first step
    assert adaptive.nfe == [5, 5]
    changed, scheduled = run(name, "Scheduled(CFG(3.0), 'linear')")
    assert distance(changed, plain) > 1e-4
    assert scheduled.trace.column("weight")[0] < scheduled.trace.column("weight")[-1]


def test_samples_stop_one_by_one() -> None:
    """The rows of a sample that has stopped are gone, those of its neighbour are not."""
    case = CASES["sd"]
    with attach(case.pipe, "Adaptive(CFG(3.0), 2.0)", trace="basic") as made:
        case(2.0)
    agreement = made.trace.column("agreement")
    with Rows(case.pipe.unet) as counted, attach(case.pipe, f"Adaptive(CFG(3.0), {agreement[0]})") as made:
        case(2.0)  # the mean of two samples: one is above it, one below
    assert counted.each[:2] == [4, 3]
    assert sorted(made.nfe)[0] == 5
    assert sum(made.nfe) == counted.total


def test_schedule_form_of_cfgpp_and_its_refusal() -> None:
    got, _ = run("sd", "CFGPP(0.6, 'schedule')")
    assert torch.isfinite(got).all()
    with pytest.raises(ValueError, match="direction of the step"):
        run("sd", "CFGPP(0.6, 'renoise')")


def test_autoguidance_with_a_weaker_network() -> None:
    """The weak network sees what the pipeline's own does: as its own weak network, it changes nothing."""
    case = CASES["sd"]
    itself, made = run("sd", "Autoguidance(3.0)", models={"weak": case.pipe.unet})
    plain, _ = run("sd", "none")
    assert distance(itself, plain) < 1e-5
    assert made.nfe == [8, 8]
    weaker = lively(unet(), 0.5).eval()
    with Rows(weaker) as counted:
        other, _ = run("sd", "Autoguidance(3.0)", models={"weak": weaker})
    assert counted.each == [2] * 4
    assert distance(other, plain) > 1e-3


def test_self_minority_takes_gradients_through_the_network() -> None:
    text = "SelfMinority(1.4, at=2.0, every=1)"
    plain, _ = run("sd", "none")
    got, made = run("sd", text, seeds=[0, 1])
    assert made.nfe == [12, 12]
    assert distance(got, plain) > 1e-4
    assert not got.requires_grad
    assert torch.equal(run("sd", text, seeds=[0, 1])[0], got)
    assert distance(run("sd", text, seeds=[2, 3])[0], got) > 1e-6
    with pytest.raises(ValueError, match="seeds"):
        run("sd", text)


@pytest.mark.parametrize("name", ["sdxl", "qwen", "z-image"])
def test_noise_on_the_condition(name: str) -> None:
    plain, _ = run(name, "CFG(3.0)")
    got, _ = run(name, "CADS(CFG(3.0))", seeds=[0, 1])
    assert torch.isfinite(got).all()
    assert distance(got, plain) > 1e-4


def prediction(unet: Any, weak: Perturbation | None = None) -> Tensor:
    x = randn(2, 4, 8, 8, seed=3)
    with torch.no_grad():
        if weak is None:
            return unet(x, torch.tensor(500), encoder_hidden_states=randn(2, 5, 12))[0]
        with weaken(unet, weak, tuple(x.shape)):
            return unet(x, torch.tensor(500), encoder_hidden_states=randn(2, 5, 12))[0]


def test_identity_attention_is_that_of_diffusers() -> None:
    net = CASES["sd"].pipe.unet
    plain = prediction(net)
    got = prediction(net, Perturbation("identity"))
    layer = net.mid_block.attentions[0].transformer_blocks[0].attn1
    before = layer.processor
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())  # takes an unperturbed half first
    try:
        with torch.no_grad():
            x, text = randn(2, 4, 8, 8, seed=3), randn(2, 5, 12)
            both = net(torch.cat([x, x]), torch.tensor(500), encoder_hidden_states=torch.cat([text, text]))[0]
    finally:
        layer.set_processor(before)
    assert distance(got, both[2:]) < 1e-5
    assert distance(got, plain) > 1e-4
    assert torch.equal(prediction(net), plain)


def test_blurred_queries() -> None:
    """A narrow Gaussian changes nothing, a wide one comes near the mean; infinity is the mean."""
    net = CASES["sd"].pipe.unet
    plain, mean = prediction(net), prediction(net, Perturbation("blur"))
    narrow, wide = (prediction(net, Perturbation("blur", ("down_blocks",), sigma)) for sigma in (0.05, 3.0))
    assert distance(narrow, plain) < 1e-5
    assert distance(wide, plain) > 1e-4
    assert distance(mean, plain) > 1e-4


def test_skipped_layers_are_those_of_sd3() -> None:
    pipe = CASES["sd3"].pipe
    arguments = {"hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([500.0, 500.0])}
    arguments |= {"encoder_hidden_states": randn(2, 5, 12), "pooled_projections": randn(2, 10)}
    with torch.no_grad():
        own = pipe.transformer(**arguments, skip_layers=[0])[0]
        with weaken(pipe.transformer, Perturbation("skip", ("0",)), (2, 4, 8, 8)):
            got = pipe.transformer(**arguments)[0]
        assert distance(got, own) < 1e-6
        assert distance(got, pipe.transformer(**arguments)[0]) > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart", "dit", "flux", "qwen", "wan"])
def test_perturbed_attention_runs_in_every_family(name: str) -> None:
    plain, _ = run(name, "none")
    got, made = run(name, "PAG(3.0)")
    assert distance(got, plain) > 1e-5
    assert made.nfe == [8, 8]
    _, three = run(name, "Sum(CFG(3.0), PAG(2.0))")
    assert three.nfe == [12, 12]
    assert torch.equal(run(name, "none")[0], plain)


def test_what_cannot_be_weakened_says_so() -> None:
    with pytest.raises(ValueError, match="layers contains 'nowhere'"):
        run("sd", "PAG(3.0, layers=('nowhere',))")
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        run("sana", "PAG(3.0)")
    with pytest.raises(ValueError, match="knows only blocks of"):
        run("lumina 2", "PAG(3.0)")
    with pytest.raises(ValueError, match="sigma=inf"):
        run("flux", "SEG(3.0, sigma=2.0)")
