"""Conditions that a callback changes during a run, in place or by other tensors, also between calls made as they came."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from torch import Tensor

from genkit.pipelines.attach import attach
from tests.attach.tiny import CASES, distance

SD = CASES["sd"]


def run(guidance: str, how: str, step: int) -> Tensor:
    def change(pipe: Any, index: int, t: Any, tensors: Any) -> Any:
        if index == step and how == "in place":
            tensors["prompt_embeds"].mul_(2)
        elif index == step and how == "another":
            tensors["prompt_embeds"] = tensors["prompt_embeds"] * 2
        return tensors

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with attach(SD.pipe, guidance), torch.no_grad():
        return SD(2.0, **options)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(
    "guidance", ["CFG(3.0)", "Interval(CFG(3.0), 0, 1, 'step')", "Interval(CFG(3.0), 2, 9, 'step')", "RectifiedCFGPP(2.0)"]
)
def test_a_change_is_noticed(guidance: str, step: int) -> None:
    changed = run(guidance, "in place", step)
    assert torch.equal(changed, run(guidance, "another", step))
    assert distance(changed, run(guidance, "not", step)) > 1e-4
