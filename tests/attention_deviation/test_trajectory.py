"""Whole images of the built-in models beside a float64 network."""

from __future__ import annotations

import torch

from genkit.attention import BACKENDS
from genkit.pipelines import deviation as dev
from genkit.pipelines.deviation import Setting


def test_images_move_with_the_dtype_and_hardly_with_the_backend() -> None:
    found = [
        Setting(torch.float32, "sdpa"),
        Setting(torch.float32, "sdpa", attention=torch.bfloat16),
        Setting(torch.bfloat16, "sdpa", autocast=True),
        Setting(torch.float32, "sdpa:efficient"),  # which a CPU does not have: no line
    ]
    lines = dev.diffusion_deviation(found, images=2, steps=3)
    names = ["float32", "float32, attention in bfloat16", "bfloat16 autocast"]
    assert [line["setting"] for line in lines] == names
    single, attention, everything = (line["largest"] for line in lines)
    # Attention alone in bfloat16 is seen (its backend is in force), and it is less than all of the network in it.
    assert 0 < single < 1e-4 < attention < everything < 0.5
    assert all(len(line["steps"]) == 3 and min(line["steps"]) > 0 for line in lines)
    assert lines[0]["changed"] < 0.01 < lines[2]["changed"]
    assert "genkit-cast" not in BACKENDS


def test_tokens_of_the_same_network_are_equal() -> None:
    (line,) = dev.token_deviation("builtin/cifar10-next-scale", [Setting(torch.float32, "sdpa:math")], images=2)
    assert line["equal"] == line["identical"] == 1
    assert 0 < line["largest"] < 1e-4 * line["scale"]


def test_default_settings_are_those_of_torch() -> None:
    found = dev.settings()
    assert {s.backend for s in found} <= {"sdpa", "sdpa:flash", "sdpa:math", "sdpa:efficient", "sdpa:cudnn"}
    assert [s.name for s in found][-4:] == [
        "float32, attention in bfloat16",
        "float32, attention in float16",
        "bfloat16 autocast",
        "float16 autocast",
    ]
