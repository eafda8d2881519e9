"""Minority score, levels and guidance, against closed forms and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import NoGuidance, parse
from genkit.guidance.minority import MinorityGuidance, SelfMinority, l2, minority_levels, minority_score, unit_peak
from genkit.noise import FLOW, VE, VP, Path, karras
from genkit.random import Fixed, Gaussian
from genkit.samplers.diffusion import sample
from tests.gaussians import Gaussians
from tests.toys import LABELS, MAIN, OTHERS, SHAPE, WEAK, Run, conditions, step_info


def unequal(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def point(seed: int = 0) -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def guided(made: Any, **models: object) -> Guided:
    return Guided({"main": MAIN, **OTHERS, **models}, made, conditions(LABELS), 4, seeds=range(4))


# ---- the score and its levels ----


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_minority_score_of_a_gaussian(path: Path) -> None:
    variance, sigma = 0.7, 1.3
    images, noises = point(1), torch.stack([point(seed) for seed in (2, 3, 4)])
    restored = variance / (variance + sigma**2) * (images + sigma * noises)  # of x0 ~ N(0, variance)
    expected = (images - restored).flatten(2).square().sum(2).sqrt().mean(0)
    model, zero = Gaussians(variances=(variance,), path=path), torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(minority_score(model, images, zero, sigma, Fixed(noises), draws=3), expected)
    first = minority_score(model, images, zero, sigma, Fixed(noises), draws=1, distance=lambda a, b: 10 * l2(a, b))
    torch.testing.assert_close(first, 10 * (images - restored[0]).flatten(1).norm(dim=1))


def test_rare_images_score_higher() -> None:
    common, rare = 0.1 * point(1), 4.0 + 0.1 * point(1)
    zero = torch.zeros(4, dtype=torch.long)
    low, high = (minority_score(Gaussians(), x, zero, 1.0, Gaussian(range(4))) for x in (common, rare))
    assert low.max() < high.min()


def test_levels_are_left_open_quantile_bins() -> None:
    scores = torch.randn(97, generator=torch.Generator().manual_seed(0)).repeat(2)  # with ties
    labels, quantiles = minority_levels(scores, 7)
    for score, label in zip(scores.double(), labels, strict=True):
        inside = [j for j in range(7) if (j == 0 or score > quantiles[j - 1]) and score <= quantiles[j]]
        assert inside == [int(label)]
    assert set(torch.bincount(labels).tolist()) == {26, 28}
    assert quantiles[-1] == scores.max()


# ---- guidance by a classifier of levels ----


@pytest.mark.parametrize("level", [0, 2])
def test_the_score_is_the_gradient_of_the_levels_log_probability(level: int) -> None:
    info = step_info(point(), sigma=0.7, path=VP)
    score = guided(MinorityGuidance(3.5, level))(info).score
    assert score is not None
    levels = torch.full((4,), 0.7, dtype=torch.float64)
    for i in range(4):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[:, i] = 1e-5
        up, down = (
            OTHERS["minority"]((info.x + sign * step.reshape(4, *SHAPE)) / info.alpha, levels, torch.full((4,), level))
            for sign in (1, -1)
        )
        torch.testing.assert_close(score.flatten(1)[:, i], 2.5 * (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_negative_levels_count_from_the_rarest() -> None:
    class Counted:
        path, levels = VE, 3

        def __call__(self, *args: Any) -> Tensor:
            return OTHERS["minority"](*args)

    info = step_info(point())
    last, named = (guided(MinorityGuidance(2.0, level), minority=Counted())(info).score for level in (-1, 2))
    assert torch.equal(last, named)
    with pytest.raises(ValueError, match=r"level=3.*has 3 levels; use -3 to 2"):
        guided(MinorityGuidance(2.0, 3), minority=Counted())(info)
    with pytest.raises(ValueError, match="does not say how many levels it has"):
        guided(MinorityGuidance(2.0))(info)


def test_a_missing_classifier_is_named() -> None:
    run = Guided({"main": MAIN}, MinorityGuidance(2.0), conditions(LABELS), 4)
    with pytest.raises(ValueError, match="'minority'; this run has main"):
        run(step_info(point()))


# ---- self-guidance ----


def test_unit_peak() -> None:
    made = unit_peak(torch.tensor([[[3.0, -6.0]], [[0.0, 0.0]], [[1e-30, 0.0]]]))
    assert made.tolist() == [[[0.5, -1.0]], [[0.0, 0.0]], [[1.0, 0.0]]]


@pytest.mark.parametrize("normalized", [True, False])
def test_self_minority_is_the_same_on_every_path(normalized: bool) -> None:
    made = SelfMinority(1.3, at=2.0, every=1, draws=2, normalized=normalized)
    ve, vp, flow = (Run(made, "euler", path=path).out for path in (VE, VP, FLOW))
    assert unequal(ve, Run(NoGuidance(), "euler").out) > 1e-2
    assert unequal(vp, ve) < 1e-8
    assert unequal(flow, ve) < 1e-8


def test_the_gradient_is_that_of_the_first_look_alone() -> None:
    made, x = SelfMinority(2.0, at=1.5, every=1, normalized=False), point()
    run = guided(made)
    info = step_info(x, sigma=0.8)
    score = run(info).score
    assert score is not None

    def look(x: Tensor, sigma: float) -> Tensor:
        return MAIN(x, torch.full((4,), sigma, dtype=torch.float64), LABELS)

    again = look(look(x, 0.8) + 1.5 * run.noise(x, info), 1.5)
    for i in range(4):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[:, i] = 1e-5
        up, down = (l2(look(x + sign * step.reshape(4, *SHAPE), 0.8), again) for sign in (1, -1))
        torch.testing.assert_close(score.flatten(1)[:, i], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("SelfMinority(1.4, at=2.0)", [0, 5]),
        ("SelfMinority(1.4, at=2.0, every=2)", [1, 3, 5]),
        ("SelfMinority(1.4, at=2.0, every=1, until=1.0)", [0, 1]),
        ("SelfMinority(1.0, at=2.0, every=1)", []),
    ],
)
def test_active_steps_and_their_cost(text: str, active: list[int]) -> None:
    run = Run(parse(text), "euler")
    trace = run.guided.trace
    assert [row["step"] for row in trace.rows if row["rows"] > 4] == active
    assert [row["step"] for row in trace.rows if row["weight"] != 1] == active
    assert run.nfe == [6 + 2 * len(active)] * 4
    sigmas = karras(6, 0.05, 3.0)
    if "until" in text:
        assert sigmas[1] > 1.0 > sigmas[2]


def test_self_minority_leads_to_rarer_images_and_below_scale_1_to_more_common_ones() -> None:
    count = 64
    labels, seeds = torch.zeros(count, dtype=torch.long), range(count)
    start = 3.0 * Gaussian(seeds)(torch.empty(count, *SHAPE, dtype=torch.float64))

    def rarity(scale: float) -> tuple[float, float]:
        """Mean minority score and mean negative log-likelihood, both of the class's own law."""
        run = Guided(MAIN, SelfMinority(scale, at=3.0, every=1), {"cond": labels}, count, seeds=seeds)
        with torch.no_grad():
            x = sample(run, start, karras(10, 0.05, 3.0), "euler", VE)
            score = minority_score(MAIN, x, labels, 2.0, Gaussian(seeds, stream=5), draws=10)
        away = torch.einsum("kij,bki->bkj", MAIN.vectors, x.flatten(1)[:, None] - MAIN.mean)
        log_density = -(away.square() / MAIN.values + MAIN.values.log()).sum(-1) / 2 + MAIN.log_weight[0]
        return float(score.mean()), -float(torch.logsumexp(log_density, 1).mean())

    common, plain, rare = (rarity(scale) for scale in (-1.0, 1.0, 3.0))
    assert common[0] + 0.1 < plain[0] < rare[0] - 0.3
    assert common[1] + 0.3 < plain[1] < rare[1] - 1.0


def test_the_distance_may_be_a_model_of_the_run() -> None:
    info = step_info(point(), sigma=0.8)
    made = SelfMinority(2.0, at=1.5, every=1, normalized=False, distance="mine")
    doubled = guided(made, mine=lambda a, b: 2 * l2(a, b)[:, None, None, None])(info).score  # LPIPS gives (B, 1, 1, 1)
    plain = guided(SelfMinority(2.0, at=1.5, every=1, normalized=False))(info).score
    assert plain is not None
    torch.testing.assert_close(doubled, 2 * plain)
    with pytest.raises(ValueError, match="'mine'; this run has main"):
        guided(made)(info)


def test_networks_keep_no_gradient_and_results_no_graph() -> None:
    class Scaled(torch.nn.Module):
        path = VE

        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
            return self.factor * WEAK(x, sigma, condition)

    net = Scaled()
    with torch.no_grad():
        result = guided(SelfMinority(1.5, at=2.0, every=1), main=net)(step_info(point()))
    assert result.score is not None
    assert not result.score.requires_grad
    assert net.factor.grad is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"at": 0.0},
        {"at": float("inf")},
        {"every": 0},
        {"draws": 0},
        {"draws": 1.5},
        {"until": -1.0},
        {"distance": 2},
        {"scale": "a"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"SelfMinority.*{name}"):
        SelfMinority(**{"scale": 1.4, **arguments})
