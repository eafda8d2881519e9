"""Guided: packing, calls, conditions, masks, models, accounting, gradients, dtypes, messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from genkit import noise
from genkit.denoiser import Condition, EDMDenoiser, Guided, Ledger
from genkit.guidance import APG, CFG, COND, UNCOND, Adaptive, Branch, Guidance, Interval, NoGuidance, Result, StepInfo, parse
from genkit.guidance.base import Need
from genkit.noise import FLOW, VE, VP, Path
from genkit.random import Fixed
from genkit.samplers.diffusion import sample
from genkit.samplers.diffusion.restart import Restart, restarted
from tests.toys import LABELS, MAIN, SHAPE, UNCONDITIONAL, WEAK, Counting, Mixture, Run, conditions, step_info

X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class _Planned(Guidance):
    """Asks for the given branches and returns the sum of what came, with the predictions kept in the state."""

    branches: tuple[Branch, ...]

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.branches

    def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
        return Result(sum(predictions.values())), dict(predictions)


def one_call(guidance: Guidance, models: Any = None, asked: Any = None, x: Tensor = X, info: StepInfo | None = None) -> Guided:
    """A run after one evaluation; its state holds the predictions of a _Planned."""
    guided = Guided(models or Counting(MAIN), guidance, asked or conditions(LABELS), len(x))
    guided(info or step_info(x))
    return guided


def direct(label: Tensor, x: Tensor = X, model: Mixture = MAIN) -> Tensor:
    return model(x, torch.ones(len(x), dtype=torch.float64), label)


NO_CLASS = torch.full_like(LABELS, UNCONDITIONAL)


def test_two_branches_are_one_call_with_cond_first() -> None:
    net = Counting(MAIN)
    run = one_call(_Planned((COND, UNCOND)), net)
    assert net.labels == [LABELS.tolist() + NO_CLASS.tolist()]
    assert net.ids == [[0, 1, 2, 3, 0, 1, 2, 3]]
    torch.testing.assert_close(run.state["cond"], direct(LABELS))
    torch.testing.assert_close(run.state["uncond"], direct(NO_CLASS))
    assert (run.ledger.calls, run.ledger.nfe) == (1, [2] * 4)


def test_rows_come_in_the_order_of_the_plan() -> None:
    net = Counting(MAIN)
    run = one_call(_Planned((UNCOND, Branch("other", condition="negative"), COND)), net)
    assert net.labels == [NO_CLASS.tolist() + ((LABELS + 1) % 3).tolist() + LABELS.tolist()]
    torch.testing.assert_close(run.state["other"], direct((LABELS + 1) % 3))
    assert (run.ledger.calls, run.ledger.nfe) == (1, [3] * 4)


def test_masked_rows_are_not_evaluated_and_hold_the_cond_prediction() -> None:
    mask = torch.tensor([True, False, False, True])
    net = Counting(MAIN)
    run = one_call(_Planned((COND, UNCOND._replace(mask=mask))), net)
    assert net.ids == [[0, 1, 2, 3, 0, 3]]
    assert net.labels == [[*LABELS.tolist(), -1, -1]]
    assert run.ledger.nfe == [2, 1, 1, 2]
    assert run.ledger.calls == 1
    torch.testing.assert_close(run.state["cond"], direct(LABELS))
    torch.testing.assert_close(run.state["uncond"], torch.where(mask[:, None, None, None], direct(NO_CLASS), direct(LABELS)))
    assert run.trace.rows[0]["rows"] == 6


def test_each_branch_has_its_own_mask() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, False, False])
    run = one_call(_Planned((COND, UNCOND._replace(mask=a), Branch("other", "negative", mask=b))))
    assert run.ledger.nfe == [2, 3, 1, 1]
    torch.testing.assert_close(run.state["other"][1], direct((LABELS + 1) % 3)[1])
    torch.testing.assert_close(run.state["other"][0], direct(LABELS)[0])


def test_masks_add_up_over_calls() -> None:
    ledger = Ledger(3)
    ledger.count(2)
    ledger.count(1, torch.tensor([True, False, True]))
    ledger.count(1, torch.tensor([True, False, False]))
    assert ledger.nfe == [4, 2, 3]


def test_a_second_model_is_one_more_call() -> None:
    main, weak = Counting(MAIN), Counting(WEAK)
    mask = torch.tensor([False, True, True, False])
    branches = (COND, Branch("weak", model="weak", mask=mask), UNCOND)
    run = one_call(_Planned(branches), {"main": main, "weak": weak})
    assert len(main.labels[0]) == 8
    assert weak.ids == [[1, 2]]
    assert (run.ledger.calls, run.ledger.nfe) == (2, [2, 3, 3, 2])
    torch.testing.assert_close(run.state["weak"][1:3], direct(LABELS, model=WEAK)[1:3])
    torch.testing.assert_close(run.state["weak"][0], direct(LABELS)[0])


class Nonempty(Counting):
    """Like the built-in network, it cannot be called with no rows."""

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        assert len(x) > 0
        return super().__call__(x, sigma, condition)


@pytest.mark.parametrize("model", ["main", "weak"])
def test_a_mask_of_no_sample_is_not_evaluated(model: str) -> None:
    main, weak = Nonempty(MAIN), Nonempty(WEAK)
    branches = (COND, Branch("other", "negative", model, mask=torch.zeros(4, dtype=torch.bool)))
    run = one_call(_Planned(branches), {"main": main, "weak": weak})
    assert (run.ledger.calls, run.ledger.nfe) == (1, [1] * 4)
    assert torch.equal(run.state["other"], run.state["cond"])
    assert run.state["other"] is not run.state["cond"]
    assert (run.trace.rows[0]["branches"], run.trace.rows[0]["rows"]) == ("cond", 4)


@pytest.mark.parametrize("cond", [(), (COND._replace(mask=torch.tensor([True, False, True, True])),)])
def test_a_mask_needs_a_cond_prediction(cond: tuple[Branch, ...]) -> None:
    branches = (*cond, UNCOND._replace(mask=torch.tensor([True, False, True, True])))
    with pytest.raises(ValueError, match="plan 'cond' without a mask beside it"):
        one_call(_Planned(branches))


def test_sigma_is_a_vector_with_one_level_a_row() -> None:
    for guidance, rows in ((NoGuidance(), 4), (CFG(3.0), 8)):
        net = Counting(MAIN)
        one_call(guidance, net, info=step_info(X, sigma=0.7))
        assert net.sigmas[0].shape == (rows,)
        assert net.sigmas[0].dtype == torch.float64
        assert net.sigmas[0].tolist() == [0.7] * rows


class Recorder:
    """Keeps the condition it is called with."""

    path = VE

    def __init__(self) -> None:
        self.seen: list[Condition] = []

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        self.seen.append(condition)
        return x


def test_condition_none() -> None:
    for guidance in (CFG(2.0), _Planned((COND, UNCOND._replace(mask=torch.tensor([True, False, False, True]))))):
        net = Recorder()
        one_call(guidance, net, {"cond": None, "uncond": None})
        assert net.seen == [None]


def test_condition_tensor() -> None:
    net = Recorder()
    one_call(CFG(2.0), net, {"cond": torch.arange(8.0).reshape(4, 2), "uncond": torch.zeros(4, 2)})
    assert torch.equal(net.seen[0], torch.cat([torch.arange(8.0).reshape(4, 2), torch.zeros(4, 2)]))


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, False, True])])
def test_condition_mapping_of_mappings(mask: Tensor | None) -> None:
    net = Recorder()
    ids = torch.arange(4)
    cond = {"text": {"ids": ids, "mask": ids > 1}, "size": 10 * ids}
    uncond = {"text": {"ids": ids + 4, "mask": ids < 1}, "size": -ids}
    one_call(_Planned((COND, UNCOND._replace(mask=mask))), net, {"cond": cond, "uncond": uncond})
    kept = [0, 1, 2, 3] if mask is None else [1, 3]
    seen = net.seen[0]
    assert seen["text"]["ids"].tolist() == [0, 1, 2, 3] + [4 + i for i in kept]
    assert seen["text"]["mask"].tolist() == [False, False, True, True] + [i < 1 for i in kept]
    assert seen["size"].tolist() == [0, 10, 20, 30] + [-i for i in kept]


def test_conditions_are_joined_once_a_run() -> None:
    net = Recorder()
    guided = Guided(net, CFG(2.0), conditions(LABELS), 4)
    for i in range(3):
        guided(step_info(X, i, 3))
    assert net.seen[0] is net.seen[1] is net.seen[2]


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("home", [VE, VP, FLOW], ids=lambda p: p.name)
def test_network_gets_x_in_its_own_coordinates(path: Path, home: Path) -> None:
    """The same point on every path: the estimate of the clean image is the same."""
    sigma = 1.7
    info = step_info(path(sigma)[0] * X, sigma=sigma, path=path)
    run = one_call(_Planned((COND,)), Mixture.random(4, path=home), x=X, info=info)
    want = MAIN(X, torch.full((4,), sigma, dtype=torch.float64), LABELS)
    torch.testing.assert_close(run.state["cond"], want, rtol=1e-12, atol=1e-12)


def test_pure_noise_is_a_regular_point() -> None:
    class AtInfinity(Recorder):
        path = FLOW

        def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
            assert torch.isinf(sigma).all()
            return x

    info = step_info(X, sigma=math.inf, path=VP)._replace(sigma_next=1.0)
    one_call(CFG(3.0), AtInfinity(), info=info)
    with pytest.raises(ValueError, match="sigma=inf has no place on the 've' path"):
        one_call(CFG(3.0), Recorder(), info=info)


def test_missing_branch() -> None:
    guided = Guided(MAIN, CFG(3.0), {"cond": LABELS}, 4)
    with pytest.raises(ValueError, match=r"asks for the 'uncond' branch, which this model does not have \(it has cond\)"):
        guided(step_info(X))


def test_missing_model() -> None:
    guided = Guided({"main": MAIN, "small": WEAK}, _Planned((COND, Branch("weak", model="weak"))), {"cond": LABELS}, 4)
    with pytest.raises(ValueError, match=r"asks for the model 'weak'; this run has main, small"):
        guided(step_info(X))


def test_unknown_trace_level() -> None:
    with pytest.raises(ValueError, match=r"trace='all': use 'none', 'basic' or 'full'"):
        Guided(MAIN, CFG(3.0), conditions(LABELS), 4, trace="all")  # type: ignore[arg-type]


def test_what_the_run_was_given_is_not_changed() -> None:
    asked = conditions(LABELS)
    before = {name: {key: value.clone() for key, value in c.items()} for name, c in asked.items()}
    start = X.clone()
    guided = Guided(MAIN, Adaptive(APG(3.0, momentum=-0.5), 0.98), asked, 4)
    sample(guided, start, noise.karras(4, 0.05, 3.0), "heun", VE)
    assert torch.equal(start, X)
    assert all(torch.equal(asked[n][k], before[n][k]) for n in before for k in before[n])


# ---- trace ----


def test_trace_levels() -> None:
    runs = {level: Run(Interval(CFG(3.0), 0.5, 2.0), trace=level) for level in ("none", "basic", "full")}
    assert len(runs["none"].guided.trace) == 0
    assert torch.equal(runs["none"].out, runs["full"].out)
    for level in ("basic", "full"):
        rows = runs[level].guided.trace.rows
        assert [(r["step"], r["stage"]) for r in rows] == [(i, s) for i in range(6) for s in ("step", "second")][:11]
        for row in rows:
            on = 0.5 < row["sigma"] <= 2.0
            assert (row["branches"], row["rows"], row["weight"]) == (("cond+uncond", 8, 3.0) if on else ("cond", 4, 1.0))
            assert ("cosine" in row) == (on and level == "full")
            assert ("update_norm" in row) == (level == "full")
            assert on or level == "basic" or row["update_norm"] == 0


def test_the_weight_is_that_in_force_where_one_branch_guides() -> None:
    weights = {
        text: [r["weight"] for r in Run(parse(text), "euler").guided.trace.rows]
        for text in ("ReuseDelta(3.0)", "MomentumGuidance(NoGuidance(), 1.5)", "CFG(0.0)", "LinearAG(3.0)", "NoGuidance()")
    }
    assert weights == {text: [w] * 6 for text, w in zip(weights, (3.0, 1.5, 0.0, 3.0, 1.0), strict=True)}


def test_the_weight_is_1_once_all_samples_have_left() -> None:
    rows = Run(Adaptive(CFG(3.0), 0.99), "euler").guided.trace.rows
    assert {r["branches"]: r["weight"] for r in rows} == {"cond+uncond": 3.0, "cond": 1.0}


# ---- restarts ----

RESTARTS = restarted("euler", [Restart(0.8, 1.2, 3, 2), Restart(0.3, 2.5, 2)])


@dataclass(frozen=True)
class _Visits(NoGuidance):
    """Notes where each step stands, and what it would draw."""

    seen: list[tuple[StepInfo, Tensor]]
    requires: ClassVar[frozenset[Need]] = frozenset({"prepare"})

    def prepare(self, info: StepInfo, run: Any, state: Any) -> Any:
        self.seen.append((info, run.noise(X, info)))
        return state


def test_a_restart_comes_by_the_steps_of_the_grid_again() -> None:
    visits = _Visits([])
    Run(visits, RESTARTS)
    grid = noise.karras(6, 0.05, 3.0).tolist()
    assert len(visits.seen) == 6 + 2 * 2 + 1
    for info, _ in visits.seen:
        assert info.total == 6
        assert info.progress == info.index / 5
        assert grid[info.index] >= info.sigma
        assert info.index == 5 or grid[info.index + 1] < info.sigma
    drawn = [value for _, value in visits.seen]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_gates_by_step_act_alike_in_every_round() -> None:
    bounds = noise.karras(6, 0.05, 3.0).tolist()
    steps, sigmas = Interval(CFG(3.0), 2, 3, "step"), Interval(CFG(3.0), bounds[4], bounds[2])
    fractions = Interval(CFG(3.0), 2 / 6 + 1e-9, 4 / 6 + 1e-9, "fraction")
    weights = [[r["weight"] for r in Run(g, RESTARTS).guided.trace.rows] for g in (steps, fractions, sigmas)]
    assert set(weights[0]) == {1.0, 3.0}
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("text", ["APG(3.0, momentum=-0.5)", "ReuseDelta(3.0, every=4)", "Adaptive(CFG(3.0), 0.99)"])
def test_a_run_begins_anew_where_the_noise_level_rises(text: str) -> None:
    """The way down after a rise is what a new run makes of the same state."""
    grid, seen = noise.karras(6, 0.05, 3.0), list[tuple[StepInfo, Result]]()
    sampler = restarted("euler", [Restart(float(grid[3]), float(grid[1]), 2)])  # up again, to below the level before

    def start(x: Tensor, sigmas: Tensor, solver: Any) -> Tensor:
        run = Guided({"main": MAIN, "weak": WEAK}, parse(text), conditions(LABELS), 4, seeds=range(4))
        return sample(run, x, sigmas, solver, VE, Fixed(X.expand(20, *X.shape)), lambda *at: seen.append(at))

    start(3 * X, grid, sampler)
    up = next(i for i in range(1, len(seen)) if seen[i][0].sigma > seen[i - 1][0].sigma_next)
    again, result = seen[up]
    fresh = Guided({"main": MAIN, "weak": WEAK}, parse(text), conditions(LABELS), 4, seeds=range(4))
    assert torch.equal(fresh(again).denoised, result.denoised)
    for info, other in seen[up + 1 :]:
        assert torch.equal(fresh(info).denoised, other.denoised)


def test_full_trace_measures_by_hand() -> None:
    guided = Guided(MAIN, CFG(3.0), {"cond": LABELS, "uncond": NO_CLASS}, 4, trace="full")
    guided(step_info(X))
    c, u = direct(LABELS), direct(NO_CLASS)
    row = guided.trace.rows[0]
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity((X - c).flatten(1), (X - u).flatten(1)).mean()))
    assert row["update_norm"] == pytest.approx(float(2 * (c - u).flatten(1).norm(dim=1).mean()))


# ---- gradients and dtypes ----

DIFFERENTIABLE: list[Guidance] = [
    NoGuidance(),
    CFG(3.0),
    APG(3.0),
    APG(3.0, eta=0.5, momentum=-0.5, threshold=0.5),
    Interval(APG(3.0, momentum=-0.5), 0.2, 2.0),
    Adaptive(CFG(3.0), 0.98),
]


@pytest.mark.parametrize("guidance", DIFFERENTIABLE, ids=repr)
def test_gradient_flows_through_one_evaluation(guidance: Guidance) -> None:
    def denoised(x: Tensor) -> Tensor:
        return Guided(MAIN, guidance, conditions(LABELS[:2]), 2, trace="full")(step_info(x)).denoised

    assert torch.autograd.gradcheck(denoised, (X[:2].clone().requires_grad_(),))


@pytest.mark.parametrize("guidance", DIFFERENTIABLE, ids=repr)
def test_gradient_flows_through_a_run(guidance: Guidance) -> None:
    grid = noise.karras(3, 0.3, 1.5)

    def image(x: Tensor) -> Tensor:
        return sample(Guided(MAIN, guidance, conditions(LABELS[:2]), 2), x, grid, "euler", VE)

    assert torch.autograd.gradcheck(image, (X[:2].clone().requires_grad_(),))


def test_gradient_reaches_the_condition() -> None:
    """A network conditioned on an embedding: the branches share nothing but x."""

    class Linear:
        path = VE

        def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
            return x.flatten(1).reshape(x.shape) * condition[:, :, None, None]

    cond = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    uncond = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    out = Guided(Linear(), CFG(3.0), {"cond": cond, "uncond": uncond}, 4)(step_info(X)).denoised
    a, b = torch.autograd.grad(out.sum(), (cond, uncond))
    torch.testing.assert_close(a, 3 * X.sum((2, 3)))
    torch.testing.assert_close(b, -2 * X.sum((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("guidance", DIFFERENTIABLE, ids=repr)
def test_dtype_in_is_dtype_out(guidance: Guidance, dtype: torch.dtype) -> None:
    grid = noise.karras(4, 0.05, 3.0)
    out = sample(Guided(MAIN, guidance, conditions(LABELS), 4), 3 * X.to(dtype), grid, "heun", VE)
    assert out.dtype == dtype
    exact = sample(Guided(MAIN, guidance, conditions(LABELS), 4), 3 * X, grid, "heun", VE)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


# ---- EDMDenoiser ----


class Constant(nn.Module):
    """A network that returns a multiple of its input and keeps what it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.seen: tuple[Tensor, Tensor, Any] | None = None

    def forward(self, x: Tensor, level: Tensor, condition: Any) -> Tensor:
        self.seen = (x, level, condition)
        return self.factor * x


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_wrapper_without_network_is_exact_for_gaussian_data(sigma_data: float) -> None:
    """For x0 ~ N(0, sigma_data^2) the best estimate is sigma_data^2 / (sigma_data^2 + sigma^2) x: the skip alone."""
    sigma = torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=torch.float64)
    denoiser = EDMDenoiser(Constant(0.0), sigma_data)
    share = sigma_data**2 / (sigma_data**2 + sigma**2)
    torch.testing.assert_close(denoiser(X, sigma, None), share[:, None, None, None] * X)


def test_edm_wrapper_preconditions_each_row_by_its_sigma() -> None:
    """Karras et al. 2022, table 1, with every row at its own noise level."""
    sigma, data = torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=torch.float64), 0.5
    network = Constant(1.0)
    out = EDMDenoiser(network, data)(X, sigma, "condition")
    assert network.seen is not None
    x, level, condition = network.seen
    assert x.dtype == level.dtype == torch.float32
    assert out.dtype == torch.float64
    assert condition == "condition"
    total = (sigma**2 + data**2)[:, None, None, None]
    torch.testing.assert_close(x.double(), X / total.sqrt(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(level.double(), sigma.log() / 4, rtol=1e-6, atol=1e-6)
    c_out = (sigma * data)[:, None, None, None] / total.sqrt()
    torch.testing.assert_close(out, data**2 / total * X + c_out * x.double(), rtol=1e-6, atol=1e-6)


def test_edm_wrapper_in_a_run_keeps_float64() -> None:
    guided = Guided(EDMDenoiser(Constant(0.3)), CFG(2.0), {"cond": None, "uncond": None}, 4)
    out = sample(guided, 3 * X, noise.edm(4, 0.05, 3.0), "heun", VE)
    assert out.dtype == torch.float64
    assert guided.ledger.nfe == [14] * 4
