"""The counter of attention pairs and FLOPs beside what torch counts while the networks run."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from genkit.attention import cost
from genkit.guidance import CFG, NoGuidance
from genkit.models.llamagen import LLAMAGEN_FILES, LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VAR_SIZES, VARConfig
from genkit.samplers.autoregressive.guided import GuidedLogits

SIDES = (1, 2, 3, 5)


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of attention and of everything else."""

    def fused(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}  # torch counts this one as nothing
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in flops.items() if "attention" in op)
    return attention, sum(flops.values()) - attention


def guided(network: Any, guidance: Any, images: int = 3) -> GuidedLogits:
    conditions = {"cond": torch.arange(images), "uncond": network.null(images)}
    return GuidedLogits(network, guidance, conditions, images)


@pytest.mark.parametrize(("guidance", "branches"), [(CFG(2.0), 2), (NoGuidance(), 1)])
def test_next_scale_costs_what_torch_counts(guidance: Any, branches: int) -> None:
    network = VAR(VARConfig(3, 64, 4, SIDES, vocabulary=96, code_dim=8, num_classes=10)).eval().requires_grad_(False)

    def run() -> None:
        run, ends = guided(network, guidance), (0, *accumulate(p * p for p in SIDES))
        for k, side in enumerate(SIDES):
            run.logits(torch.zeros(3, ends[k + 1] - ends[k], 8), k, len(SIDES))
            assert run.lengths[0] == ends[k] + side * side

    found = cost.NextScale(64, 3, 4, SIDES, vocabulary=96, code_dim=8).cost(3, branches)
    assert counted(run) == (found.attention, found.linear)
    assert found.calls == len(SIDES)
    assert found.tokens == found.positions == network.length


def test_next_scale_without_a_cache_costs_what_torch_counts_per_pass() -> None:
    network = VAR(VARConfig(3, 64, 4, SIDES, vocabulary=96, code_dim=8, num_classes=10)).eval().requires_grad_(False)
    network_sizes = cost.NextScale(64, 3, 4, SIDES, vocabulary=96, code_dim=8)
    prepared = network.prepare(torch.tensor([1, 2]))
    ends = [*accumulate(p * p for p in SIDES)]
    found, cached = network_sizes.cost(1, 2, cache=False), network_sizes.cost(1, 2)
    linear = counted(lambda: [network(torch.zeros(2, end, 8), prepared) for end in ends])[1]
    modulation = counted(lambda: network.prepare(torch.tensor([1, 2])))[1]
    assert linear + modulation == found.linear
    assert found.positions == sum(ends)
    assert found.pairs == pairs_of_masks(ends)
    assert found.cached == 0
    assert cached.cached == 2 * 2 * 3 * network.length * 64


def pairs_of_masks(ends: list[int]) -> int:
    """Pairs that a block-causal mask lets through, in passes over the first so many positions."""
    level = torch.tensor([k for k, side in enumerate(SIDES) for _ in range(side * side)])
    return sum(int((level[:end, None] >= level[:end]).sum()) for end in ends)


@pytest.mark.parametrize(("guidance", "branches"), [(CFG(2.0), 2), (NoGuidance(), 1)])
def test_next_token_costs_what_torch_counts(guidance: Any, branches: int) -> None:
    network = (
        LlamaGen(LlamaGenConfig(2, 4, 64, tokens=16, vocabulary=50, num_classes=10, multiple=32)).eval().requires_grad_(False)
    )

    def run() -> None:
        run = guided(network, guidance)
        for i in range(network.tokens):
            run.logits(torch.zeros(3, 1, dtype=torch.long), i, network.tokens)

    found = cost.NextToken(64, 2, 4, 16, 50, multiple=32).cost(3, branches)
    assert counted(run) == (found.attention, found.linear)
    assert found.positions == found.calls == 16
    assert found.exponentials == found.attention // (4 * 64) * 4


def test_next_token_without_a_cache_feeds_everything_again() -> None:
    network = (
        LlamaGen(LlamaGenConfig(2, 4, 64, tokens=9, vocabulary=50, text_dim=8, text_tokens=4, multiple=32))
        .eval()
        .requires_grad_(False)
    )
    sizes = cost.NextToken(64, 2, 4, 9, 50, prefix=4, multiple=32)
    found, cached = sizes.cost(1, 1, cache=False), sizes.cost(1, 1)
    text = {"text": torch.zeros(1, 4, 8)}
    linear = counted(lambda: [network(torch.zeros(1, n, dtype=torch.long), text) for n in range(4, 13)])[1]
    projections = 9 * 2 * 4 * (8 * 64 + 64 * 64)  # of the text, in every pass: no part of the blocks, and left out
    assert linear - projections == found.linear
    assert found.pairs == sum(int(torch.ones(n, n).tril().sum()) for n in range(4, 13))
    assert cached.pairs == int(torch.ones(12, 12).tril().sum())


def test_diffusion_costs_what_torch_counts() -> None:
    dit = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d")
    network = dit.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )

    def run() -> None:
        network(torch.zeros(6, 4, 8, 8), timestep=torch.ones(6), class_labels=torch.zeros(6, dtype=torch.long))

    found = cost.Diffusion(64, 3, 4, tokens=16, steps=1).cost(3, 2)
    attention, others = counted(run)
    assert attention == found.attention
    # That network computes the timestep's MLP in every block and once more at the end, where one is enough.
    assert others - 3 * 6 * 2 * (256 * 64 + 64 * 64) == found.linear


def test_published_sizes() -> None:
    # Peebles and Xie 2023, table 1 (multiplications and additions together count once there): 6.06, 23.01, 80.71, 118.64.
    for name, published in (("dit-s-2", 6.06), ("dit-b-2", 23.01), ("dit-l-2", 80.71), ("dit-xl-2", 118.64)):
        network = cost.MODELS[name]
        assert isinstance(network, cost.Diffusion)
        flops = network.cost(1, 1).flops / network.steps
        assert math.isclose(flops / 2e9, published, rel_tol=0.005), (name, flops)


def test_sizes_are_those_of_the_networks() -> None:
    for name, network in cost.MODELS.items():
        kind, size, *more = name.split("-")
        if isinstance(network, cost.NextScale):
            config = VAR_SIZES[size]
            assert (network.width, network.depth, network.heads) == (64 * config.depth, config.depth, config.depth)
            assert (network.sides, network.vocabulary, network.code_dim) == (
                config.patch_nums,
                config.vocabulary,
                config.code_dim,
            )
        elif isinstance(network, cost.NextToken):
            other = LLAMAGEN_FILES[f"c2i_{size}_{more[0] if more else 256}"]
            assert (network.width, network.depth, network.heads) == (other.width, other.layers, other.heads)
            assert (network.tokens, network.vocabulary, network.multiple) == (other.tokens, other.vocabulary, other.multiple)
        else:
            assert kind == "dit"


def test_growth_is_quartic_with_a_cache_alone() -> None:
    last = cost.growth((64, 128))[-1]
    assert last["next_scale"] == pytest.approx(64 / 45, rel=1e-3)
    assert last["next_token"] == pytest.approx(1 / 2, rel=1e-3)
    assert last["diffusion_step"] == 1
    without = cost.growth((64, 128), cache=False)
    assert without[1]["next_scale"] == pytest.approx(64 / 45 * 16 / 15, rel=1e-3)
    assert without[1]["next_token"] / without[0]["next_token"] == pytest.approx(4, rel=1e-3)  # of order n^6
    with pytest.raises(ValueError, match=r"side=12: give a power of 2"):
        cost.growth((12,))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main(["--model", "var-d16", "llamagen-B", "dit-xl-2", "--sides", "1,2,4", "--steps", "7", "--growth"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| var-d16 | 21 | 3 | 2 | 357 |")  # 1*1 + 4*5 + 16*21
    assert lines[3].startswith("| llamagen-B | 16 | 16 | 2 | 136 |")
    assert lines[4].startswith("| dit-xl-2 | 256 | 7 | 2 | 458,752 |")
    with pytest.raises(SystemExit):
        cost.main(["--model", "var-d17"])
    assert "var-d17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--steps 0", "steps=0"),
        ("--steps -5", "steps=-5"),
        ("--images 0", "images=0"),
        ("--branches 0", "branches=0"),
        ("--sides 0", "sides=0"),
        ("--sides 3,2,1", "sides=3,2,1"),
        ("--sides 1,,2", "commas between"),
    ],
)
def test_command_refuses_what_costs_nothing(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cost.main(["--model", "dit-s-2", *arguments.split()])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
