"""CFG-Zero*: the optimal scale and the still first steps, against recorded outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled
from genkit.guidance.cfg_zero_star import CFGZeroStar, optimal_scale
from genkit.guidance.zero_init import ZeroInit
from genkit.noise import FLOW, VE, VP, Path
from genkit.samplers.diffusion import sample
from tests.toys import Run, golden, reference, step_info

ARRAYS, META = golden("guidance/cfg_zero_star")
CASES = [pytest.param(case, id=case["key"]) for case in META["cases"]]


def of_case(case: dict[str, Any]) -> tuple[Guidance, int]:
    """The recorded method in our convention, and how many steps it stands still."""
    theirs_is_w_minus_1 = case.get("use_original_formulation", False)
    still = case["zero_init_steps"] if "zero_init_steps" in case else case["zero_steps"] + 1  # theirs: i <= zero_steps
    return ZeroInit(CFGZeroStar(case["guidance_scale"] + theirs_is_w_minus_1), still), still


@pytest.mark.parametrize("path", [FLOW, VE], ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES)
def test_recorded_velocities(case: dict[str, Any], path: Path) -> None:
    made, still = of_case(case)
    velocity = {name: torch.from_numpy(ARRAYS[f"{case['inputs']}_{name}"]).double() for name in ("cond", "uncond")}
    want = torch.from_numpy(ARRAYS[case["key"]])
    x = torch.randn(velocity["cond"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = made.init(len(x))
    for i, expected in enumerate(want):
        info = step_info(x, i, case.get("num_inference_steps", 10), sigma=1.5, path=path)
        predictions = {n: noise.to_x0(v, x, info.alpha, info.s, "flow") for n, v in velocity.items()}
        branches = made.plan(info, state)
        assert [b.name for b in branches] == ([] if i < still else ["cond", "uncond"])
        result, state = made.combine(info, {b.name: predictions[b.name] for b in branches}, state)
        v = noise.from_x0(result.denoised, x, info.alpha, info.s, "flow")
        torch.testing.assert_close(v.float(), expected, rtol=2e-6, atol=1e-5)
        assert i >= still or float(expected.abs().max()) == 0


@pytest.mark.parametrize("name", ["img", "tok"])
def test_recorded_factor(name: str) -> None:
    cond, uncond = (torch.from_numpy(ARRAYS[f"{name}_{k}"]) for k in ("cond", "uncond"))
    got = optimal_scale(cond, uncond)
    assert got.shape == (len(cond), *[1] * (cond.ndim - 1))
    for key in (f"{name}_alpha", f"{name}_alpha_official"):
        torch.testing.assert_close(got.flatten(1), torch.from_numpy(ARRAYS[key]), rtol=2e-6, atol=2e-6)


def test_factor_of_half_precision_and_of_nothing() -> None:
    u = torch.full((2, 3000), 100.0, dtype=torch.float16)  # squares overflow float16
    assert optimal_scale(2 * u, u).flatten().tolist() == [2.0, 2.0]
    assert optimal_scale(u, 0 * u).flatten().tolist() == [0.0, 0.0]


def test_velocities_in_proportion_need_no_guidance() -> None:
    """Where v_c = k v_u the scaled branch is v_c itself, whatever the scale."""
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    u = torch.tensor([[3.0, 0.5]], dtype=torch.float64)
    info = step_info(x, path=FLOW)
    predictions = {n: noise.to_x0(v, x, info.alpha, info.s, "flow") for n, v in (("cond", 0.7 * u), ("uncond", u))}
    out = CFGZeroStar(12.0).combine(info, predictions, None)[0].denoised
    torch.testing.assert_close(out, predictions["cond"], rtol=1e-7, atol=1e-7)


# ---- standing still ----


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_a_still_step_only_changes_the_noise_level(sampler: str, path: Path) -> None:
    """In the coordinates of the flow, x / (alpha + s), nothing moves."""
    states: list[Tensor] = []
    run = Run(ZeroInit(CFG(3.0), 2), sampler, path=path)
    sigmas = noise.karras(6, 0.05, 3.0)
    x = torch.ones(4, 2, 2, 1, dtype=torch.float64)
    sample(run.guided, x, sigmas, sampler, path, callback=lambda info, _: states.append(info.x / (info.alpha + info.s)))
    for state in states[1:3]:
        torch.testing.assert_close(state, states[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(states[3], states[0], atol=1e-3)


def test_still_steps_cost_nothing() -> None:
    assert reference(CFG(3.0)).nfe == [22] * 4  # 6 Heun steps, the last of one evaluation
    for steps in range(7):
        run = Run(ZeroInit(CFG(3.0), steps))
        assert run.nfe == [22 - 4 * steps if steps < 6 else 0] * 4
        assert [row["rows"] for row in run.guided.trace.rows][: 2 * steps] == [0] * min(2 * steps, 11)
    assert torch.equal(Run(ZeroInit(CFG(3.0), 0)).out, reference(CFG(3.0)).out)


def test_the_rule_inside_begins_after_the_still_steps() -> None:
    """Momentum does not see them, and a gate or schedule inside that is shut at first does not call them off."""
    for inner in (Interval(CFG(3.0), 0.1, 1.0), Scheduled(CFG(3.0), "linear")):
        assert inner.weight(step_info(torch.zeros(1, 1), 0, 6, sigma=3.0)) == 1
        assert Run(ZeroInit(inner)).guided.trace.rows[0]["branches"] == ""
    made = ZeroInit(APG(3.0, eta=1.0, momentum=0.5))
    one, state = torch.ones(1, 1), made.init(1)
    for i, want in enumerate([0.5, 3.0, 4.0]):  # x / 2, then 1 + 2 (1), 1 + 2 (1.5)
        predictions = {} if i == 0 else {"cond": one, "uncond": 0 * one}
        result, state = made.combine(step_info(one, i, 3), predictions, state)
        assert float(result.denoised) == want


def test_without_guidance_nothing_stands_still() -> None:
    for made in (ZeroInit(CFG(1.0), 3), ZeroInit(NoGuidance(), 3)):
        run = Run(made)
        assert torch.equal(run.out, reference(NoGuidance()).out)
        assert run.nfe == [11] * 4


def test_an_adaptive_stop_around_it_waits() -> None:
    run = Run(Adaptive(ZeroInit(CFG(3.0), 2), 0.98))
    assert [row["rows"] for row in run.guided.trace.rows][:4] == [0] * 4
    assert len(set(run.nfe)) > 1
    for i in range(4):
        torch.testing.assert_close(Run(Adaptive(ZeroInit(CFG(3.0), 2), 0.98), rows=(i,)).out[0], run.out[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [-1, 1.5, math.inf, math.nan, True, "one", None])
def test_steps_are_counted_in_whole_numbers(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"ZeroInit: steps=.* must be an integer from 0 on"):
        ZeroInit(CFG(3.0), steps)
    assert repr(ZeroInit(CFG(3.0), 2.0)) == "ZeroInit(inner=CFG(scale=3.0), steps=2)"  # type: ignore[arg-type]
