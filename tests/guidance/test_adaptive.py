"""Adaptive: when each sample stops, what it costs, and that nothing else about it changes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Condition, Guided
from genkit.guidance import APG, CFG, COND, UNCOND, Adaptive, Branch, Guidance, Interval, NoGuidance, Result, Scheduled, StepInfo
from genkit.guidance.adaptive import branch_cosine
from genkit.noise import FLOW, VE, VP, Path
from genkit.samplers.diffusion import sample
from tests.toys import SHAPE, Counting, Run, conditions, step_info

STEPS = 8
GRID = noise.exponential(STEPS, 0.1, 4.0)
# Sample i has cos(eps_c, eps_u) = 1 - SPEED[i] * sigma, but at least 0: the last one never agrees.
SPEED = torch.tensor([0.1, 0.2, 0.4, 40.0])
THRESHOLD = 0.9


class Scripted:
    """``eps_c`` along the first axis and ``eps_u`` at a known angle to it: samples agree when their script says so."""

    def __init__(self, path: Path = VE) -> None:
        self.path = path

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        cosine = (1 - SPEED.double()[condition["id"]] * sigma).clamp_min(0)
        eps = torch.zeros_like(x)
        eps[:, 0] = torch.where(condition["label"] < 0, cosine, 1.0)
        eps[:, 1] = torch.where(condition["label"] < 0, (1 - cosine**2).sqrt(), 0.0)
        ends = [self.path(float(s)) for s in sigma]
        alpha, s = (torch.tensor(v, dtype=x.dtype)[:, None] for v in zip(*ends, strict=True))
        return (x - s * eps) / alpha


def run(
    guidance: Guidance, rows: list[int], sampler: str = "euler", path: Path = VE, trace: Any = "basic"
) -> tuple[Tensor, Guided, Counting]:
    net = Counting(Scripted(path))
    labels = torch.zeros(len(rows), dtype=torch.long)
    asked = conditions(labels)
    for condition in asked.values():
        condition["id"] = torch.tensor(rows)
    guided = Guided(net, guidance, asked, len(rows), trace=trace)
    start = torch.ones(len(rows), 3, dtype=torch.float64) * torch.tensor(rows)[:, None]
    return sample(guided, start, GRID, sampler, path), guided, net


def guided_steps(i: int, first: int = 0, last: int = STEPS - 1) -> int:
    """Steps that sample i is guided in, when the branches are compared in steps first .. last only."""
    count = 0
    for step in range(first, last + 1):
        count += 1
        if 1 - float(SPEED[i] * GRID[step]) >= THRESHOLD:
            break
    return count


def test_the_script_separates_the_samples() -> None:
    counts = [guided_steps(i) for i in range(4)]
    assert len(set(counts)) == 4
    assert counts[-1] == STEPS
    assert counts[0] > 1


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_each_sample_leaves_at_its_own_step(path: Path) -> None:
    _, guided, net = run(Adaptive(CFG(3.0), THRESHOLD), [0, 1, 2, 3], path=path)
    want = [STEPS + guided_steps(i) for i in range(4)]
    assert guided.ledger.nfe == want
    assert net.rows(4) == want
    assert guided.ledger.calls == STEPS  # what remains still goes through the network in one call
    left = [sum(guided_steps(i) > step for i in range(4)) for step in range(STEPS)]
    assert [row["rows"] for row in guided.trace.rows] == [4 + n for n in left]


def test_a_sample_that_left_takes_the_conditional_prediction() -> None:
    guided_result = run(Adaptive(CFG(3.0), THRESHOLD), [2])[0]
    by_hand = torch.full((1, 3), 2.0, dtype=torch.float64)
    full, n = CFG(3.0), guided_steps(2)
    labels = conditions(torch.zeros(1, dtype=torch.long), first_id=2)
    for i in range(STEPS):
        sigma = GRID[i : i + 1]
        d = Scripted()(by_hand, sigma, labels["cond"])
        if i < n:
            predictions = {"cond": d, "uncond": Scripted()(by_hand, sigma, labels["uncond"])}
            d = full.combine(step_info(by_hand), predictions, None)[0].denoised
        by_hand = d + GRID[i + 1] / sigma * (by_hand - d)
    torch.testing.assert_close(guided_result, by_hand, rtol=1e-12, atol=1e-12)
    assert (run(NoGuidance(), [2])[0] - by_hand).abs().max() > 0.1


COMPOSED = [
    Adaptive(CFG(3.0), THRESHOLD),
    Adaptive(APG(4.0, momentum=-0.5, threshold=1.0), THRESHOLD),
    Adaptive(APG(4.0, eta=0.5, momentum=0.7), THRESHOLD),
    Interval(Adaptive(CFG(3.0), THRESHOLD), 0.2, 2.0),
    Adaptive(Interval(APG(3.0, momentum=-0.5), 0.2, 2.0), THRESHOLD),
    Adaptive(Scheduled(CFG(3.0), "linear"), THRESHOLD),
    Scheduled(Adaptive(CFG(3.0), THRESHOLD), "inverse_linear"),
    Adaptive(Adaptive(CFG(3.0), 0.95), THRESHOLD),
]


@pytest.mark.parametrize("guidance", COMPOSED, ids=repr)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_together_is_the_same_as_alone(guidance: Guidance, sampler: str) -> None:
    together, guided, _ = run(guidance, [0, 1, 2, 3], sampler)
    nfe = guided.ledger.nfe
    for i in range(4):
        alone, single, _ = run(guidance, [i], sampler)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)
        assert single.ledger.nfe == [nfe[i]]
    assert len(set(nfe)) > 1


def test_second_evaluations_use_the_choice_of_their_step() -> None:
    _, guided, net = run(Adaptive(CFG(3.0), THRESHOLD), [0, 1, 2, 3], "heun")
    rows = {(row["step"], row["stage"]): row["rows"] for row in guided.trace.rows}
    for step in range(STEPS - 1):
        assert rows[step, "second"] == rows[step, "step"]
    # each guided step costs two more rows, but the last step, which has one evaluation
    assert guided.ledger.nfe == [2 * STEPS - 1 + 2 * guided_steps(i) - (guided_steps(i) == STEPS) for i in range(4)]
    assert net.rows(4) == guided.ledger.nfe


def test_a_second_evaluation_never_decides() -> None:
    """Sample 0 agrees at the end of its step already; it must still be judged where the next step begins."""
    guidance = Adaptive(CFG(3.0), THRESHOLD)
    x = torch.ones(1, 3, dtype=torch.float64)
    state = guidance.init(1)
    apart, agreeing = {"cond": 0 * x, "uncond": x * torch.tensor([-9.0, 9.0, 0.0])}, {"cond": 0 * x, "uncond": 0 * x}
    _, state = guidance.combine(step_info(x, 0, 3), apart, state)
    _, state = guidance.combine(step_info(x, 0, 3, stage="second"), agreeing, state)
    assert guidance.plan(step_info(x, 1, 3), state) == (COND, UNCOND)
    _, state = guidance.combine(step_info(x, 1, 3), agreeing, state)
    assert guidance.plan(step_info(x, 1, 3, stage="second"), state) == (COND, UNCOND)
    assert guidance.plan(step_info(x, 2, 3), state) == (COND,)


def test_a_sample_that_left_is_not_judged_again() -> None:
    """Its eps may be exactly zero, whose cosine counts as 0."""
    guidance = Adaptive(CFG(3.0), THRESHOLD)
    x = torch.ones(2, 3, dtype=torch.float64)
    state = guidance.init(2)._replace(coming=torch.tensor([False, True]))
    predictions = {"cond": x, "uncond": torch.stack([x[0], -x[1]])}
    state = guidance.combine(step_info(x), predictions, state)[1]
    assert state.coming.tolist() == [False, True]


def test_leaving_is_for_good() -> None:
    guidance = Adaptive(CFG(3.0), THRESHOLD)
    x = torch.ones(2, 3, dtype=torch.float64)
    agreeing = {"cond": 0 * x, "uncond": 0 * x}
    _, state = guidance.combine(step_info(x), agreeing, guidance.init(2))
    for _ in range(3):
        assert guidance.plan(step_info(x), state) == (COND,)
        _, state = guidance.combine(step_info(x), {"cond": 0 * x}, state)


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_cosine_is_that_of_the_noise_predictions(path: Path) -> None:
    """Recorded cosine = cos of eps computed by hand, over the samples still guided; and not that of the clean-image estimates."""
    _, guided, net = run(Adaptive(CFG(3.0), THRESHOLD), [0, 1, 2, 3], path=path)
    for row in guided.trace.rows:
        left = [i for i in range(4) if guided_steps(i) > row["step"]]
        script = (1 - SPEED[left].double() * row["sigma"]).clamp_min(0)
        assert row["agreement"] == pytest.approx(float(script.mean()), abs=1e-9)
    of_images = torch.cosine_similarity(net.outputs[0][:4], net.outputs[0][4:]).mean()
    assert abs(of_images - guided.trace.rows[0]["agreement"]) > 0.01


def test_full_trace_measures_only_evaluated_branches() -> None:
    basic = run(Adaptive(CFG(3.0), THRESHOLD), [0, 1, 2, 3])[1].trace
    full = run(Adaptive(CFG(3.0), THRESHOLD), [0, 1, 2, 3], trace="full")[1].trace
    assert [row["cosine"] for row in full.rows] == pytest.approx([row["agreement"] for row in basic.rows])


def test_threshold_is_reached_at_equality() -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    same = {"cond": 0 * x, "uncond": 0 * x}
    for threshold, branches in ((1.0 - 1e-9, 1), (1.0 + 1e-9, 2)):
        guidance = Adaptive(CFG(3.0), threshold)
        state = guidance.combine(step_info(x), same, guidance.init(1))[1]
        assert len(guidance.plan(step_info(x), state)) == branches


def test_inside_or_outside_an_interval_is_the_same() -> None:
    """Neither judges a step outside the interval: there is nothing to compare there."""
    inside = run(Interval(Adaptive(CFG(3.0), THRESHOLD), 2, 5, "step"), [0, 1, 2, 3], "heun")
    outside = run(Adaptive(Interval(CFG(3.0), 2, 5, "step"), THRESHOLD), [0, 1, 2, 3], "heun")
    assert torch.equal(inside[0], outside[0])
    want = [2 * STEPS - 1 + 2 * guided_steps(i, 2, 5) for i in range(4)]
    assert inside[1].ledger.nfe == outside[1].ledger.nfe == want
    assert len(set(want)) > 1


def test_saves_evaluations_on_an_exact_model() -> None:
    full, adaptive = Run(CFG(3.0)), Run(Adaptive(CFG(3.0), 0.991))
    assert all(a < b for a, b in zip(adaptive.nfe, full.nfe, strict=True))
    assert len(set(adaptive.nfe)) > 1


@dataclass(frozen=True)
class _Redirected(Guidance):
    """Renoises along something that is not the conditional prediction, even where the branches are equal."""

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return COND, UNCOND

    def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
        return Result(predictions["cond"], direction=predictions["uncond"] / 2), state


def test_a_sample_that_left_keeps_no_direction() -> None:
    """Rows that left are renoised along their own prediction, as if they had been alone."""
    together, guided, _ = run(Adaptive(_Redirected(), THRESHOLD), [0, 2, 3], "heun")
    for k, i in enumerate([0, 2, 3]):
        alone = run(Adaptive(_Redirected(), THRESHOLD), [i], "heun")[0]
        torch.testing.assert_close(alone[0], together[k], rtol=1e-12, atol=1e-12)
    assert len(set(guided.ledger.nfe)) == 3


def test_gradient_flows_through_a_partly_stopped_batch() -> None:
    x = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    guidance = Adaptive(CFG(3.0), THRESHOLD)
    cond, uncond = x * x, torch.stack([x[0] ** 2, -x[1], 2 * x[2]])
    state = guidance.init(3)._replace(coming=torch.tensor([True, False, True]))
    out = guidance.combine(step_info(x), {"cond": cond, "uncond": uncond}, state)[0].denoised
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[2.0], [2.0], [3 * 2.0 - 2 * 2.0]]).double().expand(3, 3))


@pytest.mark.parametrize("threshold", [-1.1, float("nan"), "0.9", None, True])
def test_bad_threshold(threshold: Any) -> None:
    with pytest.raises(ValueError, match=r"Adaptive: threshold=.* must be a number from -1"):
        Adaptive(CFG(3.0), threshold)


def test_inner_must_be_a_guidance() -> None:
    with pytest.raises(TypeError, match=r"Adaptive: inner=3\.0 must be a guidance"):
        Adaptive(3.0)  # type: ignore[arg-type]


def test_measure_x0_compares_the_clean_image_estimates() -> None:
    """The two measures decide differently: here D_c and D_u are orthogonal while their eps agree, because x is large."""
    x = torch.tensor([[100.0, 100.0]], dtype=torch.float64)
    info = step_info(x, sigma=50.0)
    cond, uncond = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert float(branch_cosine(info, cond, uncond, "eps")) > 0.999
    assert float(branch_cosine(info, cond, uncond, "x0")) == pytest.approx(0.0)
    for measure, stops in (("eps", True), ("x0", False)):
        rule = Adaptive(CFG(3.0), 0.99, measure)
        state = rule.combine(info, {"cond": cond, "uncond": uncond}, rule.init(1))[1]
        assert bool(state.coming[0]) is not stops
    with pytest.raises(ValueError, match="measure='v' must be 'eps' or 'x0'"):
        Adaptive(CFG(3.0), 0.99, "v")  # type: ignore[arg-type]


def test_leaving_after_the_first_step_is_said() -> None:
    with pytest.warns(UserWarning, match="leaves guidance after the first step: at sigma=3 .* Use measure='x0'"):
        Run(Adaptive(CFG(3.0), 0.2, "eps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(Adaptive(CFG(3.0), 0.9999, "x0"))  # leaves later
        Run(Adaptive(CFG(3.0), -1.0))  # asked for


def test_pure_noise_says_nothing_about_agreement() -> None:
    """At alpha = 0 both eps are x: a flow that starts at t = 1 is guided beyond its first step."""
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    info = StepInfo(0, 4, 0.0, "step", math.inf, 3.0, 0.0, 1.0, x)
    rule = Adaptive(CFG(3.0), 0.5, "eps")
    result, state = rule.combine(info, {"cond": x, "uncond": -x}, rule.init(2))
    assert state.coming.all()
    assert "agreement" not in result.stats
