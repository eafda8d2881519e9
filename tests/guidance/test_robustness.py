"""What half precision, constant predictions, short runs, odd shapes and steps without noise level do to guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import APG, CFG, COND, Guidance, Interval, NoGuidance, Scheduled, Sum, parse
from genkit.guidance.apg_mix import APGMix
from genkit.guidance.cfgpp import CFGPP
from genkit.guidance.cond_uncond import CondUncond
from genkit.guidance.dynamic_thresholding import DynamicThresholding
from genkit.guidance.fdg import FDG
from genkit.guidance.linear_ag import LinearAG
from genkit.guidance.measures import spread
from genkit.guidance.momentum import MomentumGuidance
from genkit.guidance.norm_matched import NormMatched
from genkit.guidance.piecewise import Piecewise
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.smc import SMC
from genkit.guidance.zero_init import ZeroInit
from tests.toys import Run, reference, step_info

X = torch.zeros(1, 1)
NAN = math.nan


def latent(seed: int) -> Tensor:
    """A large latent with a standard deviation of 2, rounded to half precision."""
    return (2 * torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(seed))).half()


def guided(made: Guidance, cond: Tensor, uncond: Tensor, x: Tensor | None = None, **step: Any) -> Tensor:
    info = step_info(torch.zeros_like(cond) if x is None else x, **step)
    return made.combine(info, {"cond": cond, "uncond": uncond}, made.init(len(cond)))[0].denoised


# ---- half precision ----


@pytest.mark.parametrize(
    "text",
    [
        "Rescaled(CFG(4.0))",
        "Rescaled(CFG(4.0), space='x0')",
        "NormMatched(CFG(4.0))",
        "NormMatched(CFG(4.0), axis=1, cap=True, space='x0')",
        "DynamicThresholding(9.0, 3.0, measure='std')",
        "DynamicThresholding(9.0, 3.0, measure='std', per_channel=False, start='zero')",
        "DynamicThresholding(9.0, 3.0, percentile=0.99)",
        "APG(4.0, threshold=15.0)",
        "RAAG(9.0, alpha=1.0)",
        "SMC(4.0, k=50.0)",
        "TCFG(4.0)",
        "CFGZeroStar(4.0)",
        "MomentumGuidance(CFG(4.0), 1.5)",
        "FDG((4.0, 2.0))",
    ],
)
def test_large_latents_in_half_precision(text: str) -> None:
    made, half = parse(text), [latent(k) for k in range(3)]
    ours = guided(made, *half)
    assert ours.dtype == torch.float16
    want = guided(made, *[p.double() for p in half])
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.double(), want, rtol=4e-3, atol=0.05)


def test_spread_of_large_half_values_is_finite() -> None:
    value = latent(0)
    assert float(spread(value)) == pytest.approx(float(value.double().std()), rel=1e-5)


def test_nothing_to_correct_in_half_precision() -> None:
    one = torch.ones(2, 3, 4).half()
    assert torch.equal(guided(SMC(4.0), one, one), one)


# ---- constant predictions, and shapes ----


@pytest.mark.parametrize("made", [Rescaled(CFG(4.0)), NormMatched(CFG(4.0)), DynamicThresholding(9.0, 2.0, measure="std")])
@pytest.mark.parametrize(("cond", "uncond"), [(0.0, 0.0), (2.0, 0.5)])
def test_constant_predictions_have_finite_gradients(made: Guidance, cond: float, uncond: float) -> None:
    inputs = [torch.full((2, 3, 4, 4), v, dtype=torch.float64, requires_grad=True) for v in (cond, uncond)]
    gradients = torch.autograd.grad(guided(made, *inputs).sum(), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_an_axis_that_samples_do_not_have() -> None:
    one = torch.ones(2, 3, 4, 4)
    for axis in (5, 4, -4, -5):
        with pytest.raises(
            ValueError, match=rf"axis={axis} is no axis of a sample in x of shape \(2, 3, 4, 4\); use None, 1 to 3,"
        ):
            guided(NormMatched(CFG(3.0), axis=axis), one, 0 * one)
    for axis in (3, -3):
        assert torch.isfinite(guided(NormMatched(CFG(3.0), axis=axis), one, 0 * one)).all()


def test_dynamic_thresholding_needs_more_than_channels() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"DynamicThresholding: x of shape \(2, 3\) has one value a channel; it must be \(B, C, "
    ):
        guided(DynamicThresholding(9.0, 3.0), one, 0 * one)


# ---- steps without noise level ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Interval(CFG(3.0), 0.2, 5.0)", r"Interval: unit='sigma', but .* no noise level; use unit='step' or unit='fraction'"),
        ("Piecewise((CFG(3.0), CFG(2.0)), (1.0,))", r"Piecewise: unit='sigma', but .* use unit='step' or unit='fraction'"),
        ("CADS(CFG(3.0))", r"CADS: time='flow', but these steps have no noise level; use time='progress'"),
        ("CFGPP(0.6, 'schedule')", r"CFGPP: form='schedule', but these steps have no noise level; use CFG"),
        ("SelfMinority(1.2)", r"SelfMinority: at is a noise level, but these steps have no noise level"),
        ("MinorityPrompt(CFG(3.0))", r"MinorityPrompt: at is a noise level, but these steps have no noise level"),
    ],
)
def test_without_noise_levels(text: str, message: str) -> None:
    made, info = parse(text), step_info(X)._replace(sigma=NAN, sigma_next=NAN, alpha=1.0, s=0.0)

    def evaluate(run: Any = None) -> None:
        state = made.prepare(info, run, made.init(1))
        made.plan(info, state)
        result, state = made.combine(info, {"cond": X, "uncond": X}, state)
        made.refine(info, result, run, state)

    with pytest.raises(ValueError, match=message):
        evaluate()


@pytest.mark.parametrize("text", ["Piecewise((CFG(3.0), CFG(2.0)), (1,), 'step')", "CADS(CFG(3.0), time='progress')", "CFG(3.0)"])
def test_what_works_without_noise_levels(text: str) -> None:
    made = parse(text)
    assert len(made.plan(step_info(X)._replace(sigma=NAN, sigma_next=NAN), made.init(1))) == 2


# ---- short runs, still steps, correctors ----


@pytest.mark.parametrize(("shape", "total"), [("lambda", 2), ("v", 1), ("lambda", 1), ("v", 2)])
@pytest.mark.parametrize("preserve_mean", [True, False])
def test_no_curve_drops_all_guidance(shape: str, total: int, preserve_mean: bool) -> None:
    made = Scheduled(CFG(3.0), shape, preserve_mean=preserve_mean)
    assert [made.weight(step_info(X, i, total)) for i in range(total)] == [3.0] * total


def test_a_still_step_is_not_remembered() -> None:
    """The first evaluated step is the first of the average: there momentum changes nothing."""
    made = MomentumGuidance(ZeroInit(CFG(3.0)), 2.0)
    one = torch.ones(2, 3, dtype=torch.float64)
    state = made.init(2)
    _, state = made.combine(step_info(5 * one, 0, 3), {}, state)
    assert state.average is None
    result, state = made.combine(step_info(one, 1, 3), {"cond": one, "uncond": 0 * one}, state)
    torch.testing.assert_close(result.denoised, 3 * one)


def test_a_schedule_that_begins_at_1_turns_stillness_off() -> None:
    assert Scheduled(ZeroInit(CFG(3.0)), "linear").plan(step_info(X, 0, 6), None) == (COND,)
    assert ZeroInit(Scheduled(CFG(3.0), "linear")).plan(step_info(X, 0, 6), None) == ()


def test_the_schedule_of_cfgpp_in_a_correction_is_its_strength() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    hook, schedule = CFGPP(0.6), CFGPP(0.6, "schedule")
    for made in (hook, schedule):
        assert float(guided(made, one, 0 * one, sigma=4.0, stage="corrector")) == pytest.approx(0.6)
    assert float(guided(schedule, one, 0 * one, sigma=4.0)) == pytest.approx(1.2)  # to half the level


# ---- an override where every scale is 1 ----


@pytest.mark.parametrize(
    ("made", "same"),
    [
        (Sum(CFG(1.0), NoGuidance()), CFG(3.0)),
        (Sum(CFG(1.0), CFG(1.0)), CFG(5.0)),
        (Piecewise((CFG(1.0), CFG(1.0)), (0.5,)), CFG(3.0)),
        (FDG((1.0, 1.0)), CFG(3.0)),
        (APGMix(CFG(1.0), APG(1.0, eta=1.0)), CFG(3.0)),
    ],
    ids=repr,
)
def test_an_override_is_obeyed_where_all_scales_are_1(made: Guidance, same: Guidance) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    info, state = step_info(torch.zeros_like(cond), weight=3.0), made.init(2)
    assert made.weight(info) == 3.0
    assert len(made.plan(info, state)) == 2
    torch.testing.assert_close(guided(made, cond, uncond, weight=3.0), guided(same, cond, uncond))
    assert made.plan(step_info(cond), state) == made.plan(step_info(cond, weight=1.0), state) == (COND,)


# ---- coefficients, and the base of methods on two predictions ----

COEFFICIENTS = ((), (1.0, -1.0, 1.0), (0.9,), (), (1.1, -0.5, 0.4), (1.0, -1.0, 1.0))


def test_laws_of_fitted_coefficients() -> None:
    """Those of the laws that keep to six first-order steps, which such an object is for."""
    made = LinearAG(3.0, COEFFICIENTS)
    inner, plain = Run(made, "euler"), reference(NoGuidance(), "euler")
    assert inner.nfe == [8] * 4
    whole, none, off = (Run(g, "euler") for g in (Interval(made, 0, math.inf), Interval(made, 1, 1), LinearAG(1.0, COEFFICIENTS)))
    assert torch.equal(whole.out, inner.out)
    assert torch.equal(none.out, plain.out)
    assert torch.equal(off.out, plain.out)
    permuted = Run(made, "euler", rows=(2, 0, 3, 1))
    torch.testing.assert_close(permuted.out, inner.out[[2, 0, 3, 1]], rtol=0, atol=1e-9)


def test_coefficients_of_long_runs_read_back() -> None:
    rows = tuple((1.23456, -0.987654, 0.000123456, 3.14159, -2.71828) for _ in range(250))
    made = LinearAG(3.0, ((), *rows), ((), *rows))
    assert len(repr(made)) > 20_000
    assert parse(repr(made)) == made


def test_the_base_of_two_predictions() -> None:
    class _Far(CondUncond):
        scale = 2.0

        def rule(self, info: Any, predictions: Any, state: Any) -> Any:
            raise AssertionError("called")

    one, made = torch.ones(2, 3), _Far()
    off = step_info(one, weight=1.0)
    assert made.plan(off, None) == (COND,)
    assert [b.name for b in made.plan(step_info(one), None)] == ["cond", "uncond"]
    result, state = made.combine(off, {"cond": one}, "kept")
    assert result.denoised is one
    assert state == "kept"
    with pytest.raises(AssertionError, match="called"):
        made.combine(step_info(one), {"cond": one, "uncond": one}, None)
