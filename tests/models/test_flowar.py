"""FlowAR: the official transformer, velocity networks, loss and sampling."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.denoiser import MissingCondition
from genkit.guidance import parse
from genkit.guidance.cfg import CFG
from genkit.guidance.interval import Interval
from genkit.guidance.none import NoGuidance
from genkit.models.flowar import FLOWAR_SIZES, FlowAR, FlowARConfig, time_grid
from genkit.models.flowar_velocity import FlowDenoiser
from genkit.random import Noise
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.autoregressive.flow_scale import GuidedFlow, flowar_guidance, next_scale_flow
from tests.tokenizers import golden

FILES = ("flowar_v1", "flowar_cross")
SIZES = [1, 4, 16, 64, 256]


@lru_cache(maxsize=2)
def build(name: str) -> tuple[FlowAR, dict[str, Tensor], dict[str, Any]]:
    tensors, meta = golden.read(name)
    c = meta["config"]
    width = c["encoder_embed_dim"]
    model = FlowAR(FlowARConfig(width, 2, c["diffloss_w"], 1, c["cross"], heads=c["encoder_num_heads"]))
    rows = torch.zeros(1001, width)
    rows[[3, 7, 1000]] = tensors["class_emb.rows"]
    model.load_state_dict({**golden.under(tensors, "state_dict."), "class_emb.weight": rows})
    return model.eval().requires_grad_(False), tensors, meta


@lru_cache(maxsize=1)
def small() -> FlowAR:
    torch.manual_seed(0)
    model = FlowAR(FlowARConfig(16, 2, 16, 1, cross=True, heads=2, patch_nums=(1, 2, 4), channels=3, num_classes=5))
    for value in model.parameters():
        value.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def inputs_of(model: FlowAR, latents: list[Tensor]) -> Tensor:
    """Inputs of all scales from the latents of all but the last; what stands at the first is not read."""
    nothing = latents[0].new_full((len(latents[0]), 1, latents[0].shape[2]), torch.nan)
    return torch.cat([nothing, *(model.next_input(x, k + 1) for k, x in enumerate(latents))], 1)


def recorded(values: list[Tensor]) -> Noise:
    """The conditional rows of the noise of each scale."""
    return lambda like, k: values[k][: len(like)].to(like)


@pytest.mark.parametrize("name", FILES)
def test_velocity_and_features_are_the_official_ones(name: str) -> None:
    model, tensors, _ = build(name)
    golden.close(model.flownet(tensors["velocity.x"], tensors["velocity.t"], tensors["velocity.cond"]), tensors["velocity.out"])
    inputs = inputs_of(model, [x[:2] for x in golden.listed(tensors, "sample.out")[:-1]])
    for condition, rows in ((tensors["labels"], slice(0, 2)), (model.null(2), slice(2, 4))):
        found = model(inputs, condition).split(SIZES, 1)
        for z, wanted in zip(found, golden.listed(tensors, "sample.z"), strict=True):
            golden.close(z, wanted[rows])


@pytest.mark.parametrize("name", FILES)
def test_the_loss_is_the_official_one(name: str) -> None:
    model, tensors, _ = build(name)
    times = [t.flatten() for t in golden.listed(tensors, "train.t")]
    found = model.loss(tensors["train.latents"], tensors["labels"], times, golden.listed(tensors, "train.noise"))
    golden.close(found, tensors["train.loss"])


@pytest.mark.parametrize("name", FILES)
def test_latents_are_the_official_ones(name: str) -> None:
    model, tensors, meta = build(name)
    run = GuidedFlow(
        model, flowar_guidance(meta["cfg"], meta["guidance_high"]), {"cond": tensors["labels"], "uncond": model.null(2)}, 2
    )
    seen: list[Tensor] = []
    latent = next_scale_flow(
        run,
        [0, 1],
        steps=meta["num_steps"],
        noise=recorded(golden.listed(tensors, "sample.noise")),
        callback=lambda k, x: seen.append(x.flatten(2).mT),
    )
    golden.close(latent, tensors["sample.tokens"])
    for found, wanted in zip(seen, golden.listed(tensors, "sample.out"), strict=True):
        golden.close(found, wanted[:2].double())
    weights = [w for w in dict.fromkeys(run.trace.column("weight")) if w != 1]
    assert weights == pytest.approx(meta["cfg_per_scale"][1:])


def test_a_cache_changes_nothing() -> None:
    model = small()
    inputs, label = torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4])
    whole = model(inputs, label)
    for ends in ((1, 5, 21), (5, 21)):
        cache, start = StaticCache.of(model, 2), 0
        for end in ends:
            golden.close(model(inputs[:, start:end], label, cache, start), whole[:, start:end], 1e-5)
            start = end
    changed = inputs.clone()
    changed[:, 5:] += 1
    golden.close(model(changed, label)[:, :5], whole[:, :5], 1e-5)


class Counting(FlowAR):
    """Notes the label and the positions of every pass."""

    def forward(self, inputs: Tensor, condition: Tensor, *args: Any, **options: Any) -> Tensor:
        self.passes = [*getattr(self, "passes", []), (int(condition[0]), inputs.shape[1])]
        return super().forward(inputs, condition, *args, **options)


def counting() -> Counting:
    model = Counting(small().config)
    model.load_state_dict(small().state_dict())
    return model.eval().requires_grad_(False)


def run_of(model: FlowAR, guidance: Any, rows: slice = slice(None), seeds: tuple[int, ...] = (5, 6)) -> tuple[Tensor, GuidedFlow]:
    label = torch.tensor([2, 3])[rows]
    run = GuidedFlow(model, guidance, {"cond": label, "uncond": model.null(len(label))}, len(label), seeds=seeds)
    return next_scale_flow(run, seeds, steps=4), run


def test_what_is_not_planned_is_not_computed() -> None:
    model = counting()
    plain, run = run_of(model, NoGuidance())
    assert model.passes == [(2, 1), (2, 4), (2, 16)]
    assert run.ledger.nfe == [3 + 3 * 4] * 2
    assert torch.equal(run_of(model, flowar_guidance(1.0))[0], plain)
    model.passes = []
    _, run = run_of(model, flowar_guidance(3.0, 0.5))  # times 1, 0.3, 0.25, 0.125: three of four guided, but at the first scale
    assert sorted(model.passes) == sorted([(2, 1), (2, 4), (2, 16), (5, 5), (5, 16)])  # the null branch catches up
    assert run.ledger.nfe == [3 + 3 * 4 + 2 + 2 * 3] * 2
    model.passes = []
    run_of(model, Interval(CFG(3.0), 2, 2, unit="step"))
    assert (5, 21) in model.passes


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    whole, _ = run_of(small(), flowar_guidance(3.0, 0.9))
    for i in (0, 1):
        golden.close(run_of(small(), flowar_guidance(3.0, 0.9), slice(i, i + 1), (5 + i,))[0][0], whole[i], 1e-5)
    assert (run_of(small(), flowar_guidance(3.0, 0.9), seeds=(5, 7))[0][1] - whole[1]).abs().max() > 1e-2


def test_other_guidances_and_samplers_run() -> None:
    golden.close(run_of(small(), parse("APG(3.0, eta=1.0)"))[0], run_of(small(), CFG(3.0))[0], 1e-4)
    moved, _ = run_of(small(), parse("APG(3.0, momentum=-0.5)"))  # its average is of one flow: scales differ in size
    assert moved.isfinite().all()
    label, weak = torch.tensor([2, 3]), counting()
    run = GuidedFlow({"main": small(), "weak": weak}, parse("Autoguidance(2.0)"), {"cond": label}, 2)
    golden.close(next_scale_flow(run, [5, 6], steps=4), run_of(small(), NoGuidance())[0], 1e-4)  # guided by itself
    assert len(weak.passes) == 3
    run = GuidedFlow(small(), CFG(2.0), {"cond": label, "uncond": small().null(2)}, 2)
    assert next_scale_flow(run, [5, 6], steps=4, sampler="flow_heun").isfinite().all()


def test_the_denoiser_inverts_the_flow() -> None:
    """With v = n - x0, D is x0 at every time."""
    clean, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Exact(torch.nn.Linear):
        def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
            return noise - clean

    for t in (1.0, 0.65, 0.1):
        sigma = torch.full((3,), t / (1 - t) if t < 1 else torch.inf, dtype=torch.float64)
        x = (1 - t) * clean + t * noise
        golden.close(FlowDenoiser(Exact(1, 1, dtype=torch.float64))(x, sigma, None), clean, 1e-12)


def test_time_grids() -> None:
    golden.close(time_grid(50), 1 - torch.arange(51, dtype=torch.float64) / 50, 1e-12)
    golden.close(time_grid(6), torch.tensor([1, 0.65, 0.3, 0.25, 0.25 * 2 / 3, 0.25 / 3, 0], dtype=torch.float64), 1e-12)
    assert len(time_grid(25)) == 25


@pytest.mark.parametrize(("size", "millions"), [("S", 171.7), ("L", 586.9), ("H", 1913.3)])
def test_parameter_counts(size: str, millions: float) -> None:
    """The paper's 170M, 589M and 1.9B."""
    with torch.device("meta"):
        model = FlowAR(FLOWAR_SIZES[size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_weights_are_read_with_a_mask_beside_them(tmp_path: Any) -> None:
    weights = {**small().state_dict(), "mask": torch.zeros(1, 1, 21, 21)}
    torch.save(weights, tmp_path / "FlowAR.pth")
    with torch.device("meta"):
        model = FlowAR(small().config)
    model.load_state(tmp_path / "FlowAR.pth")
    inputs, label = torch.ones(1, 21, 3), torch.tensor([1])
    assert torch.equal(model(inputs, label), small()(inputs, label))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="depth=3"):
        FlowAR(FlowARConfig(16, 3, 16, 1, cross=False))
    with pytest.raises(ValueError, match="steps=1"):
        time_grid(1)
    with pytest.raises(ValueError, match=r"high=1\.5"):
        flowar_guidance(2.0, 1.5)
    run = GuidedFlow(small(), CFG(2.0), {"cond": torch.tensor([1])}, 1)
    with pytest.raises(MissingCondition, match="uncond"):
        next_scale_flow(run, [0], steps=2)
    with pytest.raises(ValueError, match="seeds"):
        next_scale_flow(run, [0, 1])
    with pytest.raises(ValueError, match="condition during a flow"):
        run_of(small(), parse("ICG(2.0)"))
