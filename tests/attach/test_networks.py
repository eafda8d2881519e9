"""Networks a pipeline may hold in another form: absent, pooled, not a module, changing what they are given."""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

from genkit.pipelines.attach import attach
from tests.attach.tiny import CASES, control_net, distance, sd, wan22

SD = CASES["sd"]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_network_that_is_no_module_is_refused() -> None:
    class Proxy:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["module"], name)

    pipe = quiet(sd(unet=SD.pipe.unet))
    pipe.unet = Proxy(pipe.unet)
    with attach(pipe, "CFG(3.0)"), pytest.raises(ValueError, match=r"pipe\.unet is a Proxy, no nn\.Module"):
        SD(2.0, pipe=pipe)


def test_a_pipeline_that_does_not_call_its_network_is_an_error() -> None:
    pipe = quiet(sd(unet=SD.pipe.unet))

    class Elsewhere(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.scheduler.set_timesteps(4)
            return {}

    pipe.__class__ = Elsewhere
    with attach(pipe, "CFG(3.0)"), pytest.raises(RuntimeError, match="called none of unet"):
        pipe(guidance_scale=2.0)


def test_wan_with_the_low_noise_network_only() -> None:
    whole = wan22()
    parts = {"vae": whole.vae, "scheduler": whole.scheduler, "text_encoder": None, "tokenizer": None, "boundary_ratio": 1.0}
    pipe = quiet(diffusers.WanPipeline(transformer=None, transformer_2=whole.transformer_2, **parts))
    own = CASES["wan"](3.0, pipe=pipe)
    with attach(pipe, "CFG(3.0)") as run:
        assert distance(CASES["wan"](2.0, pipe=pipe), own) < 1e-5
    assert run.nfe == [8, 8]


def test_a_controlnet_that_pools_is_the_pipelines_own() -> None:
    pipe = quiet(sd("StableDiffusionControlNetPipeline", controlnet=control_net(global_pool_conditions=True)))
    case = CASES["sd control"]
    own = case(3.0, pipe=pipe)
    with attach(pipe, "CFG(3.0)"):
        assert distance(case(2.0, pipe=pipe), own) < 1e-5


def test_a_network_that_takes_keys_out_of_its_arguments() -> None:
    """Flux pops the embeddings of its IP-Adapter from the mapping both calls of a step share."""
    case = CASES["flux"]
    pipe = quiet(case.make())
    net, original = pipe.transformer, pipe.transformer.forward
    net.encoder_hid_proj = torch.nn.Module()
    net.encoder_hid_proj.num_ip_adapters, net.encoder_hid_proj.image_projection_layers = 1, []

    @functools.wraps(original)
    def forward(*args: Any, joint_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        out = original(*args, joint_attention_kwargs=None, **kwargs)
        given = joint_attention_kwargs.pop("ip_adapter_image_embeds", None) if joint_attention_kwargs else None
        return out if given is None else (out[0] + given[0].mean((1, 2))[:, None, None],)

    def prepared(image: Any, embeds: Any, *_: Any, **__: Any) -> Any:
        return embeds

    net.forward, pipe.prepare_ip_adapter_image_embeds = forward, prepared
    images = {
        "ip_adapter_image_embeds": [torch.full((2, 1, 6), 0.5)],
        "negative_ip_adapter_image_embeds": [torch.full((2, 1, 6), -0.3)],
    }
    own = case(3.0, pipe=pipe, **images)
    assert distance(case(3.0, pipe=pipe), own) > 1e-3
    for guidance in ("CFG(3.0)", "APG(3.0, eta=1.0)"):
        with attach(pipe, guidance):
            assert distance(case(2.0, pipe=pipe, **images), own) < 1e-5


def test_ip_adapter_embeddings_of_stable_diffusion_3_are_split_with_their_rows() -> None:
    case = CASES["sd3"]
    pipe = quiet(case.make())
    original = pipe.transformer.forward

    @functools.wraps(original)
    def forward(*args: Any, joint_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        out = original(*args, joint_attention_kwargs=None, **kwargs)
        return (out[0] + joint_attention_kwargs["ip_adapter_image_embeds"].mean((1, 2))[:, None, None, None],)

    pipe.transformer.forward = forward
    images = {"ip_adapter_image_embeds": torch.stack([torch.full((1, 6), v) for v in (-0.3, 0.7)])}
    own = case(3.0, pipe=pipe, **images)
    assert distance(case(3.0, pipe=pipe, ip_adapter_image_embeds=images["ip_adapter_image_embeds"].flip(0)), own) > 1e-3
    with attach(pipe, "CFG(3.0)"):
        assert distance(case(2.0, pipe=pipe, **images), own) < 1e-5
    with attach(pipe, "none"):
        got = case(2.0, pipe=pipe, **images)
    assert distance(got, case(1.0, pipe=pipe, ip_adapter_image_embeds=torch.full((1, 1, 6), 0.7))) < 1e-5
