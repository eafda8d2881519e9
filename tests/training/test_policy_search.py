"""Policy search on a model in closed form whose guidance acts at high noise levels only."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import CFG, NoGuidance, parse
from genkit.guidance.piecewise import Piecewise
from genkit.noise import VE
from genkit.pipelines.diffusion import ClassPipeline
from genkit.training import linear_ag, policy_search
from genkit.training.policy_search import Search, _Relaxed, _Runs, as_guidance, load_policy, search_policy


class Early:
    """The exact denoiser of N(m, 1/4), but the class moves m (label 2 is none) only above sigma 1."""

    path = VE

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor, /) -> Tensor:
        s = sigma.to(x)[:, None, None, None]
        mean = torch.tensor([-1.0, 1.0, 0.0]).to(x)[label][:, None, None, None] * (s > 1) * (s / 4)
        return mean.tanh() * (1 + 0.3 * x.sin()) + 0.25 / (0.25 + s**2) * x


@pytest.fixture
def pipe() -> ClassPipeline:
    return ClassPipeline({"main": Early()}, ("ant", "bee"), (1, 2, 2), "f" * 64, "toy", sigma_min=0.05, sigma_max=8.0)


CLASSES, SEEDS = [0, 1] * 4, list(range(8))
SEARCH = Search(3.0, steps=7, cost=0.2, iterations=40, lr=0.3)


def runs(pipe: ClassPipeline, search: Search = SEARCH) -> _Runs:
    return _Runs(pipe, search, torch.tensor(CLASSES), SEEDS)


def error(pipe: ClassPipeline, weights: Any) -> tuple[float, float]:
    """Squared distance to CFG in units of that without guidance, and NFE, by the pipeline itself."""
    options: Any = {"sampler": SEARCH.sampler, "steps": SEARCH.steps}
    made, full, none = (pipe(CLASSES, SEEDS, g, **options) for g in (as_guidance(weights), CFG(3.0), NoGuidance()))
    off = [(run.latents - full.latents).double().square().mean() for run in (made, none)]
    return float(off[0] / off[1]), made.nfe[0]


def test_a_search_finds_where_guidance_acts(pipe: ClassPipeline) -> None:
    policy = search_policy(pipe, CLASSES, SEEDS, SEARCH)
    sigmas = runs(pipe).sigmas[:-1].tolist()
    assert all(w == 1.0 for w, sigma in zip(policy.weights, sigmas, strict=True) if sigma <= 1)
    assert any(w != 1.0 for w in policy.weights)
    assert (policy.error, policy.nfe) == pytest.approx(error(pipe, policy.weights), rel=1e-4)
    assert policy.nfe_full == 14
    guided = sum(w not in (0.0, 1.0) for w in policy.weights)
    assert 0 < guided < 7
    assert policy.nfe == 7 + guided
    even = {round(i * 6 / max(guided - 1, 1)) for i in range(guided)}  # CFG at as many steps, spread over the run
    uniform, nfe = error(pipe, [3.0 if i in even else 1.0 for i in range(7)])
    assert nfe == policy.nfe
    assert policy.error < 0.5 * uniform


def test_price_decides_how_much_is_guided(pipe: ClassPipeline) -> None:
    cheap, dear = (search_policy(pipe, CLASSES, SEEDS, Search(3.0, steps=7, iterations=25, cost=c)) for c in (0.001, 30.0))
    assert dear.nfe == 7
    assert cheap.nfe > dear.nfe
    assert cheap.error < dear.error


def test_one_hot_probabilities_are_the_policy(pipe: ClassPipeline) -> None:
    weights = torch.tensor(SEARCH.weights, dtype=torch.float64)
    choice = torch.tensor([2, 3, 0, 1, 4, 0, 0])
    relaxed = _Relaxed(torch.nn.functional.one_hot(choice, len(weights)).double(), weights)
    made = as_guidance([float(weights[c]) for c in choice])
    (soft, run), (hard, kept) = (runs(pipe)(g, range(8)) for g in (relaxed, made))
    torch.testing.assert_close(soft, hard)
    assert kept.ledger.nfe == [int(run.state)] * 8 == [10] * 8


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_gradient_is_that_of_the_whole_run(pipe: ClassPipeline, sampler: str) -> None:
    """Against central differences, through the sampler and the checkpointed network."""
    sampled, weights = runs(pipe, Search(3.0, steps=4, sampler=sampler)), torch.tensor(SEARCH.weights, dtype=torch.float64)
    logits = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5).requires_grad_()

    def loss(at: Tensor) -> Tensor:
        images, run = sampled(_Relaxed(at.softmax(1), weights), range(8))
        return images.double().square().mean() + 0.1 * run.state

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    for i, c in itertools.product((0, 2), (1, 4)):
        step = torch.zeros_like(logits)
        step[i, c] = 0.01  # the images are float32
        with torch.no_grad():
            slope = float(loss(logits + step) - loss(logits - step)) / 0.02
        assert float(gradient[i, c]) == pytest.approx(slope, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("weights", "made"),
    [
        ([3.0, 3.0], CFG(3.0)),
        ([1.0], NoGuidance()),
        ([0.0, 3.0, 3.0, 1.0], Piecewise((CFG(0.0), CFG(3.0), NoGuidance()), (1, 3), "step")),
    ],
)
def test_equal_neighbours_are_one_piece(weights: list[float], made: Any) -> None:
    assert as_guidance(weights) == made
    assert parse(repr(as_guidance(weights))) == made


def test_choices() -> None:
    assert Search(3.0).weights == (1.0, 0.0, 2.0, 3.0, 5.0)
    assert Search(2.0, scales=(4.0, 1.0, 0.0, 4.0)).weights == (1.0, 0.0, 4.0)


def test_command_writes_what_it_prints(
    pipe: ClassPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy_search, "load", lambda model, device: pipe)
    file = tmp_path / "policy.json"
    policy_search.main(["--samples", "4", "--steps", "5", "--iterations", "3", "--scales", "3", "6", "--out", str(file)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("rows per sample instead of 10")
    assert parse(printed[-1]) == load_policy(file)
    content = json.loads(file.read_text())
    assert parse(printed[-1]) == load_policy(file, sampler="euler", steps=5)
    with pytest.raises(ValueError, match=r"sampler='heun': the policy in .* was searched with sampler='euler'"):
        load_policy(file, sampler="heun")
    with pytest.raises(ValueError, match=r"steps=7: the policy in .* was searched with steps=5"):
        load_policy(file, steps=7)
    assert content["about"]["seeds"] == [1_000_000, 1_000_001, 1_000_002, 1_000_003]
    assert content["about"]["fingerprint"] == "f" * 64
    assert (content["search"]["scales"], content["search"]["iterations"], len(content["weights"])) == ([3.0, 6.0], 3, 5)


def test_command_that_fits_linear_ag(
    pipe: ClassPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linear_ag, "load", lambda model, device: pipe)
    file = tmp_path / "coefficients.json"
    linear_ag.main(["--scale", "3", "--samples", "4", "--steps", "5", "--sampler", "euler", "--out", str(file)])
    made = parse(capsys.readouterr().out)
    assert made == linear_ag.LinearAG.load(file, sampler="euler", steps=5, scale=3.0, grid="karras")
    assert pipe([0, 1], guidance=made, sampler="euler", steps=5).nfe == [7, 7]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "genkit-policy-1"}', '{"format": "x", "guidance": "CFG(2)"}'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(ValueError, match=r"policy\.json"):
        load_policy(tmp_path / "policy.json")


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 1.0},
        {"steps": 0},
        {"cost": -1.0},
        {"hot": 0.0},
        {"iterations": 2.5},
        {"lr": float("nan")},
        {"scales": (float("nan"),)},
        {"scales": (2.0, "3")},
        {"cold": 1.0, "hot": 0.1},
    ],
)
def test_bad_searches(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        Search(**{"scale": 3.0, **change})


def test_bad_samples(pipe: ClassPipeline) -> None:
    with pytest.raises(ValueError, match="one class and one seed"):
        search_policy(pipe, [0, 1], [0], SEARCH)
    with pytest.raises(ValueError, match="classes contains 7"):
        search_policy(pipe, [7], [0], SEARCH)
    with pytest.raises(ValueError, match="grid='none'"):
        search_policy(pipe, [0], [0], Search(3.0, grid="none"))
