"""PAG, SEG and SLG: their formula with diffusers' guiders as the witness, and what a weakened network does in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import genkit
from genkit.denoiser import EDMDenoiser, Guided
from genkit.guidance import CFG, COND, UNCOND, Guidance, Interval, NoGuidance, StepInfo
from genkit.guidance.pag import PAG
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.seg import SEG
from genkit.guidance.slg import SLG
from genkit.guidance.sum import Sum
from genkit.models.unet import UNet, UNetConfig
from tests.toys import golden, step_info

ARRAYS, META = golden("guidance/multi_branch")
CASES = {case["key"]: case for case in META["cases"]}
ALL = [PAG(4.0), PAG(2.5, ("down",)), SEG(4.0), SEG(3.0, sigma=0.7), SLG(3.8), SLG(0.5, ("down.2", "up.0"))]


# ---- the formula ----


def stand_in(guidance: Guidance, **named: str) -> Tensor:
    """The guidance on recorded predictions: those of weakened branches by their name."""
    info = step_info(torch.from_numpy(ARRAYS["cond"]))
    state = guidance.init(3)
    plan = guidance.plan(info, state)
    predictions = {b.name: torch.from_numpy(ARRAYS[named.get(b.name, b.name)]) for b in plan}
    return guidance.combine(info, predictions, state)[0].denoised


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("slg")])
def test_skip_layer_guidance_of_diffusers(key: str) -> None:
    case = CASES[key]
    original = case.get("use_original_formulation", False)
    both = Sum(CFG(case["guidance_scale"] + original), SLG(1 + case["skip_layer_guidance_scale"]))
    made = Rescaled(both, case.get("guidance_rescale", 0.0), space="x0")
    torch.testing.assert_close(stand_in(made), torch.from_numpy(ARRAYS[key]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("ltx2")])
def test_four_branches_of_ltx2(key: str) -> None:
    case = CASES[key]
    cfg_and_stg = Sum(CFG(case["guidance_scale"]), SLG(1 + case["stg_scale"]))
    made = Rescaled(Sum(cfg_and_stg, SLG(case["modality_scale"], ("audio",))), case.get("guidance_rescale", 0.0), space="x0")
    out = stand_in(made, **{"skip(audio)": "modality"})
    torch.testing.assert_close(out, torch.from_numpy(ARRAYS[key]), rtol=2e-6, atol=2e-6)


def test_branches_have_the_condition_and_a_name_of_their_own() -> None:
    """diffusers 0.42.1 gives the weakened branch the negative prompt where CFG is off."""
    made = [*ALL, SEG(4.0, layers=("down",)), SLG(2.0, ("down",)), SLG(2.0, ("down", "up"))]
    branches = [m.branch for m in made]
    assert len({b.name for b in branches}) == len(made)
    assert {b.condition for b in branches} == {"cond"}
    assert PAG(4.0).branch == PAG(2.0).branch
    info = step_info(torch.zeros(1, 1))
    assert PAG(4.0).plan(info, None) == (COND, PAG(4.0).branch)
    assert [b.name for b in Sum(Sum(CFG(2.0), SLG(3.0, ("7", "8"))), SEG(2.0, 1.5)).plan(info, ((None, None), None))] == [
        "cond",
        "uncond",
        "skip(7, 8)",
        "blur(sigma=1.5)",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAG(float("nan")), "PAG: scale=nan must be a finite number"),
        (lambda: PAG(3.0, layers="mid"), "PAG: layers='mid' must be a tuple of names, such as"),  # type: ignore[arg-type]
        (lambda: SLG(3.0, layers=(7, 8)), r"SLG: layers=\(7, 8\) must be a tuple of names"),  # type: ignore[arg-type]
        (lambda: SEG(3.0, sigma=0.0), "SEG: sigma=0.0 blurs nothing"),
        (lambda: SEG(3.0, sigma=-1.0), "SEG: sigma=-1.0 must be a number from 0 to inf"),
    ],
)
def test_arguments_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_list_of_layers_becomes_a_tuple() -> None:
    made = PAG(3.0, layers=["down", "up"])  # type: ignore[arg-type]
    assert made == PAG(3.0, ("down", "up"))
    assert hash(made)


# ---- on a network ----


def network(seed: int = 0) -> EDMDenoiser:
    """A small random U-Net with attentions on the way down and up; its zero-initialised layers have weights."""
    torch.manual_seed(seed)
    net = UNet(UNetConfig(image_size=8, num_classes=3, channels=(8, 16), attention=(1,), embedding=16, groups=4))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.3)
    return EDMDenoiser(net).eval().requires_grad_(False)


def run_of(guidance: Guidance, net: EDMDenoiser, names: tuple[str, ...] = ("cond", "uncond")) -> Guided:
    given = {"cond": torch.tensor([0, 1, 2]), "uncond": torch.full((3,), 3)}
    return Guided(net, guidance, {name: given[name] for name in names}, 3)


def here(index: int = 0) -> StepInfo:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return step_info(2 * x, index, 5, sigma=2.0)


class Values(nn.Module):
    """The attention with the identity as its map, written out."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.of.out(self.of.qkv(self.of.norm(x)).chunk(3, dim=1)[2])
        return x + values


@pytest.mark.parametrize("index", [0, 3])
def test_pag_moves_away_from_the_network_without_attention_maps(index: int) -> None:
    """Alone, without an unconditional condition, and from the first step on: diffusers 0.42.1 fails at all three."""
    net, operated = network(), network()
    for stage in (operated.network.get_submodule("down.2"), operated.network.get_submodule("up.0")):
        stage.register_module("1", Values(stage.get_submodule("1")))
    info, labels = here(index), torch.tensor([0, 1, 2])
    sigma = torch.full((3,), 2.0, dtype=torch.float64)
    strong, weak = net(info.x, sigma, labels), operated(info.x, sigma, labels)
    run = run_of(PAG(4.0), net, ("cond",))
    torch.testing.assert_close(run(info).denoised, strong + 3 * (strong - weak), rtol=0, atol=1e-5)
    assert (strong - weak).abs().max() > 1e-2
    assert (run.ledger.nfe, run.ledger.calls) == ([2, 2, 2], 2)


@pytest.mark.parametrize("made", ALL, ids=str)
def test_only_the_weakened_rows_change(made: Any) -> None:
    net, info = network(), here()
    run = run_of(Sum(CFG(3.0), made), net)
    plain = run_of(NoGuidance(), net).evaluate(info, (COND, UNCOND))
    mixed = run.evaluate(info, (COND, made.branch, UNCOND))
    assert torch.equal(mixed["cond"], plain["cond"])
    assert torch.equal(mixed["uncond"], plain["uncond"])
    assert (mixed[made.branch.name] - plain["cond"]).flatten(1).norm(dim=1).min() > 1e-2


@pytest.mark.parametrize("made", ALL, ids=str)
def test_sum_with_cfg_costs_three_rows_in_two_passes(made: Any) -> None:
    net, info = network(), here()
    both = run_of(Sum(CFG(3.0), made), net)
    out = both(info).denoised
    cond = run_of(NoGuidance(), net)(info).denoised
    pushes = [run_of(part, net)(info).denoised - cond for part in (CFG(3.0), made)]
    torch.testing.assert_close(out, cond + pushes[0] + pushes[1], rtol=0, atol=1e-10)
    assert (both.ledger.nfe, both.ledger.calls) == ([3, 3, 3], 2)


def test_two_weakenings_are_two_predictions() -> None:
    net, info = network(), here()
    run = run_of(Sum(PAG(2.0), SLG(2.0)), net)
    run(info)
    assert (run.ledger.nfe, run.ledger.calls) == ([3, 3, 3], 3)
    finite, mean = (run_of(SEG(4.0, sigma), net)(info).denoised for sigma in (0.7, float("inf")))
    assert (finite - mean).abs().max() > 1e-3


def test_outside_an_interval_the_network_is_whole_and_runs_once() -> None:
    net, info = network(), here()
    run = run_of(Interval(PAG(4.0), 3.0, 9.0), net)
    assert torch.equal(run(info).denoised, run_of(NoGuidance(), net)(info).denoised)
    assert run.ledger.nfe == [1, 1, 1]


def test_the_network_is_whole_again_after_an_error() -> None:
    net, info = network(), here()
    before = run_of(NoGuidance(), net)(info).denoised

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = net.network.out_norm.register_forward_hook(fail)  # type: ignore[union-attr]
    for made in ALL:
        with pytest.raises(RuntimeError, match="out of memory"):
            run_of(made, net).evaluate(info, (made.branch,))
    handle.remove()
    assert torch.equal(run_of(NoGuidance(), net)(info).denoised, before)


def test_a_network_that_cannot_be_weakened() -> None:
    class Plain:
        path = EDMDenoiser.path

        def __call__(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"PAG\(scale=4.0, layers=\(\)\) needs a network that can be weakened"):
        Guided(Plain(), PAG(4.0), {"cond": None}, 3)(here())
    with pytest.raises(ValueError, match=r"'blocks.7', which this network does not have; it has .*middle"):
        run_of(SLG(3.0, ("blocks.7",)), network())(here())


# ---- on the built-in model ----


@pytest.fixture(scope="module")
def pipe() -> Any:
    return genkit.load("builtin/cifar10")


def test_guidances_by_text_change_images_of_the_built_in_model(pipe: Any) -> None:
    main = pipe.models["main"]
    weights = {key: value.clone() for key, value in main.state_dict().items()}

    def make(guidance: str) -> Any:
        return pipe(classes=[3, "ship"], seeds=[0, 1], guidance=guidance, sampler="euler", steps=4)

    plain = make("none")
    outs = [make(text) for text in ("PAG(4.0)", "SEG(4.0)", "SLG(2.0)", "PAG(4.0, layers=('up',))", "SLG(2.0, layers=('up.2',))")]
    for i, out in enumerate(outs):
        assert out.nfe == [8, 8]
        assert out.latents.isfinite().all()
        assert all((out.latents - other.latents).abs().max() > 1e-2 for other in [plain, *outs[:i]])
    assert torch.equal(make("none").latents, plain.latents)
    assert make("Sum(CFG(2.0), PAG(2.0))").nfe == [12, 12]
    assert main.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in main.state_dict().items())
