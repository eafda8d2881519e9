"""A copy made inside attach is an ordinary pipeline; wrong options are refused at once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

from genkit.pipelines.attach import attach
from tests.attach.tiny import CASES

SD = CASES["sd"]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_made_inside_is_not_attached(way: Any) -> None:
    with attach(SD.pipe, "CFG(3.0)") as run:
        made = way(SD.pipe)
    assert type(made) is diffusers.StableDiffusionPipeline
    assert torch.equal(SD(3.0, pipe=made), SD(3.0))
    assert run.nfe == []


@pytest.mark.parametrize(("options", "name"), [({"trace": "all"}, "trace"), ({"seeds": [-1]}, "seeds")])
def test_options_are_checked_at_once(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name), attach(SD.pipe, "CFG(3.0)", **options):
        pass


def test_a_time_between_timesteps_is_not_truncated() -> None:
    """The pipeline gives its network whole numbers, a guidance may ask about a level between two of them."""
    told: list[float] = []
    handle = SD.pipe.unet.time_proj.register_forward_pre_hook(lambda _, args: told.extend(args[0].tolist()))
    try:
        with attach(SD.pipe, "SelfMinority(1.4, at=2.0, every=1)", seeds=[0, 1]):
            SD(2.0)
    finally:
        handle.remove()
    alphas = SD.pipe.scheduler.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    above = int((sigmas < 2.0).sum())
    (t,) = {*told} - {float(t) for t in SD.pipe.scheduler.timesteps}
    assert above - 1 < t < above, "between the timesteps whose levels are next to 2"


def test_a_call_of_the_network_from_a_callback_is_named() -> None:
    def ask(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        pipe.unet(tensors["latents"], t, encoder_hidden_states=torch.zeros(2, 5, 12))
        return tensors

    with attach(SD.pipe, "CFG(3.0)"), pytest.raises(ValueError, match="outside the pipeline's loop"):
        SD(2.0, callback_on_step_end=ask)


def test_the_second_scale_of_wan_is_refused() -> None:
    case = CASES["wan 2.2"]
    with attach(case.pipe, "CFG(3.0)"), pytest.raises(ValueError, match=r"guidance_scale_2=9\.0.*Piecewise"):
        case(2.0, guidance_scale_2=9.0)
