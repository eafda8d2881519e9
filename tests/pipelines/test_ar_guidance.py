"""Guidance that changes over tokens and scales: what it evaluates, what is counted, what the trace says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit import Filters, ScalePipeline, TokenPipeline, var_guidance
from genkit.guidance import parse
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VARConfig
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from tests.pipelines.tiny_ar import spread

SIDES = (1, 2, 3, 4)
CLASSES = [0, 1, 2, 0]


class Fed:
    """How many positions a network was fed, in rows times positions, and in how many calls."""

    def __init__(self, network: Any) -> None:
        self.positions, self.calls = 0, 0
        network.register_forward_pre_hook(self)

    def __call__(self, network: Any, args: tuple[Any, ...]) -> None:
        self.positions, self.calls = self.positions + args[0].shape[0] * args[0].shape[1], self.calls + 1


def pipe_of(kind: str) -> tuple[Any, Fed]:
    torch.manual_seed(0)
    if kind == "tokens":
        network: Any = LlamaGen(LlamaGenConfig(2, 2, 16, tokens=16, vocabulary=24, num_classes=3, multiple=8))
        coder = CompactTokenizer(CompactConfig("simvq", 24, 4, 32, image_size=16)).eval()
        return TokenPipeline({"main": spread(network)}, coder, "toy"), Fed(network)
    network = VAR(VARConfig(2, 16, 2, SIDES, vocabulary=24, code_dim=4, num_classes=3))
    coder = CompactTokenizer(CompactConfig("multiscale", 24, 4, 32, image_size=16, patch_nums=SIDES)).eval()
    return ScalePipeline({"main": spread(network)}, coder, "toy scales", filters=Filters(order="var")), Fed(network)


# Which steps are guided, of 16 tokens and of 4 scales; and how many positions the null branch is fed (all up to its last step).
SCHEDULES = [
    ("CFG(3.0)", range(16), range(4), 16, 30),
    ("APG(4.0)", range(16), range(4), 16, 30),
    ("APG(4.0, eta=0.5, threshold=2.0)", range(16), range(4), 16, 30),
    ("Interval(CFG(3.0), 0, 5, 'step')", range(6), range(4), 6, 30),
    ("Interval(CFG(3.0), 2, 2, 'step')", [2], [2], 3, 14),
    ("Interval(APG(4.0), 0.25, 0.5, 'fraction')", range(4, 8), [1], 8, 5),
    ("Interval(CFG(3.0), 20, 30, 'step')", [], [], 0, 0),
    ("Scheduled(CFG(4.0), 'linear', preserve_mean=False)", range(1, 16), range(1, 4), 16, 30),
    ("Scheduled(CFG(4.0), 'inverse_linear')", range(15), range(3), 15, 14),
    ("Interval(Scheduled(CFG(4.0), 'cosine'), 0, 3, 'step')", range(1, 4), range(1, 4), 4, 30),
    ("Piecewise((CFG(4.0), NoGuidance(), APG(2.0)), (1, 3), 'step')", [0, *range(3, 16)], [0, 3], 16, 30),
    ("Adaptive(CFG(3.0), 1.1)", range(16), range(4), 16, 30),
]


@pytest.mark.parametrize("kind", ["tokens", "scales"])
@pytest.mark.parametrize(("text", "tokens", "scales", "fed", "fed_scales"), SCHEDULES)
def test_what_is_not_guided_is_not_evaluated(kind: str, text: str, tokens: Any, scales: Any, fed: int, fed_scales: int) -> None:
    pipe, network = pipe_of(kind)
    out = pipe(CLASSES, guidance=text, trace="full")
    steps, length, null = (tokens, 16, fed) if kind == "tokens" else (scales, 30, fed_scales)
    assert out.nfe == [length + null] * len(CLASSES)
    assert network.positions == sum(out.nfe)  # what was counted is what the network was given
    assert network.calls == out.calls
    rows = out.trace.rows
    assert [row["step"] for row in rows] == list(range(pipe.steps))
    assert [row["step"] for row in rows if "uncond" in row["branches"]] == list(steps)
    assert sum(row["rows"] for row in rows) == sum(out.nfe)
    for row in rows:
        guided = row["step"] in steps
        assert ("cosine" in row) == guided
        assert (row["update_norm"] > 0) == guided
        assert (row["weight"] != 1) == guided


def test_the_weight_of_every_scale() -> None:
    pipe, _ = pipe_of("scales")
    rows = pipe(0, guidance=var_guidance(1.5)).trace.rows
    assert [row["weight"] for row in rows] == pytest.approx([1.0, 1.5, 2.0, 2.5])


@pytest.mark.parametrize("kind", ["tokens", "scales"])
def test_adaptive_guidance_ends_for_each_image_by_itself(kind: str) -> None:
    """By the cosine of the centred logits of both branches, after the step in which it reaches the threshold."""
    pipe, network = pipe_of(kind)
    full = [pipe(label, seed, "CFG(3.0)", trace="full").trace.rows for seed, label in enumerate(CLASSES)]
    threshold = sorted(max(row["cosine"] for row in rows) for rows in full)[2] - 1e-4  # two images reach it at least
    network.positions = network.calls = 0
    out = pipe(CLASSES, guidance=f"Adaptive(CFG(3.0), {threshold})", trace="full")
    assert network.positions == sum(out.nfe)
    assert network.calls == out.calls
    sizes = [1] * 16 if kind == "tokens" else [p * p for p in SIDES]
    expected = []
    for rows in full:
        reached = [row["step"] for row in rows if row["cosine"] >= threshold]
        expected.append(sum(sizes) + sum(sizes[: reached[0] + 1] if reached else sizes))
    assert out.nfe == expected
    assert len(set(out.nfe)) > 1
    for seed, label in enumerate(CLASSES):
        alone = pipe(label, seed, f"Adaptive(CFG(3.0), {threshold})")
        assert torch.equal(alone.tokens[0], out.tokens[seed])
        assert alone.nfe == [out.nfe[seed]]


@pytest.mark.parametrize("text", ["APG(4.0, momentum=-0.5)", "Interval(APG(4.0, momentum=-0.5), 1, 3, 'step')"])
def test_momentum_needs_steps_of_one_shape(text: str) -> None:
    pipe, network = pipe_of("tokens")
    out = pipe(CLASSES, guidance=text)
    assert network.positions == sum(out.nfe)
    assert torch.equal(pipe(CLASSES, guidance=text, batch_size=1).tokens, out.tokens)
    with pytest.raises(ValueError, match=r"keeps an average over steps, but they differ in shape .*; turn its momentum off"):
        pipe_of("scales")[0](0, guidance=text)


@pytest.mark.parametrize("text", ["ZeroInit(CFG(2.0))", "CFGPP(0.6)", "FDG((2.0, 3.0))", "Interval(CFGPP(0.6), 0, 3, 'step')"])
def test_what_is_made_for_images(text: str) -> None:
    with pytest.raises(ValueError, match="is made for images or their noise levels, which logits do not have; use CFG, "):
        pipe_of("tokens")[0](0, guidance=parse(text))
