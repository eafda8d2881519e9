"""Videos made from an image by per-token timesteps (Wan TI2V): the first frame is clean, and no part of what is guided."""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import Tensor

from genkit.guidance import CFG, parse
from genkit.guidance.base import Predictions, Result, StepInfo
from genkit.pipelines.attach import attach
from tests.attach.tiny import distance, image, randn, text, wan

FRAMES, TOKENS = 4, 16  # latent frames, and tokens of each


@functools.cache
def pipe() -> Any:
    whole = wan()
    parts = {"transformer": whole.transformer, "vae": whole.vae, "scheduler": whole.scheduler}
    made = diffusers.WanImageToVideoPipeline(text_encoder=None, tokenizer=None, expand_timesteps=True, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def call(scale: float, steps: int = 3, **options: Any) -> Tensor:
    inputs = {**text(1), "image": image(1), "height": 16, "width": 16, "num_frames": FRAMES - 1, "output_type": "latent"}
    inputs |= {"latents": randn(1, 4, FRAMES, 8, 8, seed=3), "num_inference_steps": steps, "guidance_scale": scale}
    return pipe()(**inputs, **options).frames


class Seen:
    """What reached the network, what it answered, and what the scheduler was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.x, self.times, self.raw, self.steps = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        net, scheduler = pipe().transformer, pipe().scheduler
        forward, step = net.forward, scheduler.step

        @functools.wraps(forward)
        def watched(hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
            out = forward(hidden_states=hidden_states, timestep=timestep, **kwargs)
            for record, value in ((self.x, hidden_states), (self.times, timestep), (self.raw, out[0])):
                record.append(value.clone())
            return out

        def stepped(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.steps.append(prediction.clone())
            return step(prediction, *args, **kwargs)

        monkeypatch.setattr(net, "forward", watched)
        monkeypatch.setattr(scheduler, "step", stepped)


def test_cfg_is_the_pipelines_own() -> None:
    own = call(3.0)
    assert distance(call(1.0), own) > 1e-2
    for guidance in ("CFG(3.0)", "APG(3.0, eta=1.0)"):
        with attach(pipe(), guidance) as run:
            assert distance(call(2.0), own) < 1e-5
        assert run.nfe == [6]


def test_a_rule_sees_the_noisy_frames_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at their own noise level: its norms and projections would feel a wrong first frame."""
    infos, estimates = list[StepInfo](), list[Predictions]()

    class _Watch(CFG):
        affine = False

        def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
            infos.append(info)
            estimates.append(predictions)
            return super().combine(info, predictions, state)

    seen = Seen(monkeypatch)
    with attach(pipe(), _Watch(3.0)):
        call(2.0)
    for i, (info, found) in enumerate(zip(infos, estimates, strict=True)):
        assert torch.equal(info.x, seen.x[2 * i][:, :, 1:])
        assert info.s == pytest.approx(float(seen.times[2 * i].max()) / 1000, rel=2e-3)  # timesteps are whole numbers
        for k, name in enumerate(("cond", "uncond")):
            torch.testing.assert_close(found[name], info.x - info.s * seen.raw[2 * i + k][:, :, 1:])
        assert not seen.steps[i][:, :, 0].any(), "the pipeline does not read the first frame"


def test_apg_in_the_noisy_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out: D = D_c + (w - 1) (d - its part along D_c), d = D_c - D_u, over the frames but the first."""
    seen = Seen(monkeypatch)
    with attach(pipe(), "APG(3.0)"):
        call(2.0, steps=1)
    sigma = float(pipe().scheduler.sigmas[0])
    x, cond, uncond = (v[:, :, 1:].double() for v in (seen.x[0], seen.raw[0], seen.raw[1]))
    cond, uncond = x - sigma * cond, x - sigma * uncond
    d = cond - uncond
    d = d - cond * (d * cond).sum() / cond.square().sum()
    assert distance(x - sigma * seen.steps[0][:, :, 1:].double(), cond + 2.0 * d) < 1e-5


@pytest.mark.parametrize("guidance", ["RectifiedCFGPP(2.0, time='end')", "PAG(2.0)"])
def test_further_evaluations_keep_the_first_frame(guidance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    with attach(pipe(), parse(guidance)):
        call(2.0)
    assert len(seen.x) > len(seen.steps)
    for x, time in zip(seen.x, seen.times, strict=True):
        assert torch.equal(x[:, :, 0], seen.x[0][:, :, 0])
        assert not time[:, :TOKENS].any()
        assert (time[:, TOKENS:] == time[0, -1]).all()
        assert time[0, -1] > 0
    if guidance.startswith("Rectified"):
        assert seen.times[1].max() < seen.times[0].max(), "it evaluates at the level where the step ends"


def test_other_levels_within_an_image_are_refused() -> None:
    def ramp(module: Any, args: Any, kwargs: Any) -> Any:
        time = kwargs["timestep"].clone()
        time[:, -1] = time[:, -1] / 2
        return args, {**kwargs, "timestep": time}

    handle = pipe().transformer.register_forward_pre_hook(ramp, with_kwargs=True)
    try:
        with attach(pipe(), "CFG(3.0)"), pytest.raises(ValueError, match="different times for parts of one image"):
            call(2.0)
    finally:
        handle.remove()
