"""Corrections of guidance formulas: closed forms, hand-worked values, edges and bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled
from genkit.guidance.apg_mix import APGMix
from genkit.guidance.base import signature
from genkit.guidance.dynamic_thresholding import DynamicThresholding, quantile
from genkit.guidance.fdg import FDG
from genkit.guidance.measures import ratio, spread
from genkit.guidance.momentum import MomentumGuidance
from genkit.guidance.norm_matched import NormMatched
from genkit.guidance.raag import RAAG
from genkit.guidance.rectified_cfgpp import RectifiedCFGPP
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.reuse_delta import ReuseDelta
from genkit.guidance.smc import SMC
from genkit.guidance.tcfg import TCFG, damped
from genkit.noise import FLOW, VE
from tests.toys import Run, reference, step_info


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COND, UNCOND, X = randn(3, 4, 6, 5, seed=1), randn(3, 4, 6, 5, seed=2), randn(3, 4, 6, 5, seed=3)


def once(guidance: Guidance, cond: Tensor = COND, uncond: Tensor = UNCOND, state: Any = None, **step: Any) -> tuple[Tensor, Any]:
    info = step_info(X if cond.shape == X.shape else torch.zeros_like(cond), **step)
    result, state = guidance.combine(info, {"cond": cond, "uncond": uncond}, guidance.init(len(cond)) if state is None else state)
    return result.denoised, state


# ---- Rescaled, NormMatched ----


def test_rescaled_by_one_has_the_std_of_the_conditional_prediction() -> None:
    for space in noise.SPACES:
        out, _ = once(Rescaled(CFG(7.0), 1.0, space=space), path=FLOW)
        at = (X, *FLOW(1.0), space)
        for ours, want in zip(noise.from_x0(out, *at), noise.from_x0(COND, *at), strict=True):
            assert float(ours.std()) == pytest.approx(float(want.std()), rel=1e-12)
            assert float(ours.std()) > 0.1


@pytest.mark.parametrize("inner", [CFG(0.0), CFG(-1.0), CFG(4.0)])
def test_a_correction_always_has_the_conditional_prediction_to_compare_with(inner: CFG) -> None:
    wrapped = Rescaled(inner, 1.0)
    assert {b.name for b in wrapped.plan(step_info(X), None)} == {"cond", "uncond"}
    out, _ = once(wrapped)
    assert float(spread(noise.from_x0(out, X, 1.0, 1.0, "v"))[0]) == pytest.approx(float((X - 2 * COND)[0].std()))


def test_rescaled_leaves_unguided_evaluations_alone() -> None:
    run, plain = Run(Rescaled(Interval(CFG(5.0), 0.1, 0.5), 1.0)), Run(Interval(CFG(5.0), 0.1, 0.5))
    assert run.nfe == plain.nfe
    assert not torch.equal(run.out, plain.out)
    assert torch.equal(Run(Rescaled(CFG(1.0))).out, reference(NoGuidance()).out)
    assert torch.equal(Run(NormMatched(NoGuidance(), limit=0.5)).out, reference(NoGuidance()).out)


def test_what_is_guided_by_one_prediction_is_corrected_too() -> None:
    inner = ReuseDelta(5.0, 2)
    run = Run(Rescaled(inner, 1.0), "euler")
    assert {row["rows"] for row in run.guided.trace.rows} == {4, 8}
    state, spreads = inner.init(3), []
    for i in range(2):
        made = Rescaled(inner, 1.0, space="x0")
        info = step_info(X, i, 4)
        predictions = {b.name: COND if b.name == "cond" else UNCOND for b in made.plan(info, state)}
        result, state = made.combine(info, predictions, state)
        spreads.append((len(predictions), spread(result.denoised) / spread(COND)))
    assert [n for n, _ in spreads] == [2, 1]
    for _, value in spreads:
        torch.testing.assert_close(value, torch.ones_like(value))


def test_phi_0_is_inner() -> None:
    torch.testing.assert_close(Run(Rescaled(APG(4.0, momentum=-0.5), 0.0)).out, Run(APG(4.0, momentum=-0.5)).out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("cond", [0.0, 3.0])
@pytest.mark.parametrize("uncond", [0.0, 3.0, -1.5])
def test_constant_predictions_stay_finite(dtype: torch.dtype, cond: float, uncond: float) -> None:
    c, u = torch.full((2, 3, 4), cond, dtype=dtype), torch.full((2, 3, 4), uncond, dtype=dtype)
    plain, _ = once(CFG(4.0), c, u)
    for space in ("v", "x0"):
        rescaled, _ = once(Rescaled(CFG(4.0), space=space), c, u)  # type: ignore[arg-type]
        torch.testing.assert_close(rescaled, plain)
    for axis in (None, 1, -1):
        for cap in (False, True):
            out, _ = once(NormMatched(CFG(4.0), axis, cap), c, u)
            assert torch.isfinite(out).all()


def test_rounding_is_not_scaled_up() -> None:
    sizes, targets = torch.tensor([2.0, 1e-3, 1e-7, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(ratio(targets, sizes), torch.tensor([0.5, 1e3, 1.0, 1.0, 1.0]))
    assert float(ratio(torch.tensor(0.0), torch.tensor(1.0))) == 0


def test_std_of_one_value_is_0() -> None:
    out, _ = once(Rescaled(CFG(4.0)), torch.ones(3, 1), torch.zeros(3, 1))
    assert out.tolist() == [[4.0]] * 3


@pytest.mark.parametrize("axis", [None, 1, 2, -1])
def test_norms_match_along_the_axis(axis: int | None) -> None:
    dims = (1, 2, 3) if axis is None else axis
    for space, limit in (("x0", 1.0), ("eps", 0.7), ("flow", 1.3)):
        out, _ = once(NormMatched(CFG(6.0), axis, limit=limit, space=space), path=FLOW)  # type: ignore[arg-type]
        at = (X, *FLOW(1.0), space)
        ours, want = noise.from_x0(out, *at), noise.from_x0(COND, *at)
        plain = noise.from_x0(once(CFG(6.0))[0], *at)
        length, target, before = (p.square().sum(dims, keepdim=True).sqrt() for p in (ours, want, plain))
        torch.testing.assert_close(length, limit * target)
        torch.testing.assert_close(ours / length, plain / before)


def test_capped_norms_only_shrink() -> None:
    cond, uncond = torch.tensor([[3.0, 4.0], [0.0, 1.0]])[None], torch.tensor([[3.0, 4.0], [0.0, -2.0]])[None]
    # CFG(0.5): the first token stays (3, 4); the second becomes (0, -0.5), shorter than (0, 1)
    grown, _ = once(NormMatched(CFG(0.5), -1, space="x0"), cond, uncond)
    capped, _ = once(NormMatched(CFG(0.5), -1, cap=True, space="x0"), cond, uncond)
    tight, _ = once(NormMatched(CFG(0.5), -1, cap=True, limit=0.4, space="x0"), cond, uncond)
    torch.testing.assert_close(grown, torch.tensor([[[3.0, 4.0], [0.0, -1.0]]]))
    torch.testing.assert_close(capped, torch.tensor([[[3.0, 4.0], [0.0, -0.5]]]))
    torch.testing.assert_close(tight, torch.tensor([[[1.2, 1.6], [0.0, -0.4]]]))


def test_a_result_that_is_replaced_afterwards_cannot_be_corrected() -> None:
    for make in (Rescaled, NormMatched, MomentumGuidance):
        with pytest.raises(ValueError, match=r"inner=RectifiedCFGPP.* replaces its estimate"):
            make(RectifiedCFGPP(4.0))


# ---- momentum ----


@pytest.mark.parametrize("space", noise.SPACES)
def test_momentum_guidance_is_its_recurrence(space: noise.Space) -> None:
    guidance = MomentumGuidance(CFG(3.0), 1.5, 0.6, space=space)
    state, average, a, s = guidance.init(3), None, *FLOW(2.0)
    for k in range(4):
        cond, uncond = randn(3, 4, 6, 5, seed=10 + k), randn(3, 4, 6, 5, seed=20 + k)
        out, state = once(guidance, cond, uncond, state, sigma=2.0, path=FLOW)
        g = noise.from_x0(uncond + 3 * (cond - uncond), X, a, s, space)
        average = g if average is None else average
        torch.testing.assert_close(noise.from_x0(out, X, a, s, space), g + 0.5 * (g - average))
        average = 0.4 * g + 0.6 * average


def test_momentum_guidance_alone_costs_one_evaluation_a_step() -> None:
    run, plain = Run(MomentumGuidance(NoGuidance(), 1.5)), reference(NoGuidance())
    assert run.nfe == plain.nfe
    assert (run.out - plain.out).abs().max() > 0.01
    torch.testing.assert_close(Run(MomentumGuidance(CFG(3.0), 1.0)).out, reference(CFG(3.0)).out, rtol=0, atol=0)


def test_an_override_is_that_of_the_momentum() -> None:
    made, cond, uncond = MomentumGuidance(CFG(3.0), 1.5), randn(3, 4, 6, 5, seed=8), randn(3, 4, 6, 5, seed=9)
    _, state = once(made)
    want, _ = once(MomentumGuidance(CFG(3.0), 2.5), cond, uncond, state)
    got, _ = once(made, cond, uncond, state, weight=2.5)
    assert torch.equal(got, want)
    assert Scheduled(made, "linear").scale == 1.5


def test_smc_is_its_recurrence() -> None:
    guidance = SMC(4.0, k=0.3, slope=5.0)
    state, before = guidance.init(3), None
    for i in range(4):
        cond, uncond = randn(3, 4, 6, 5, seed=10 + i), randn(3, 4, 6, 5, seed=20 + i)
        out, state = once(guidance, cond, uncond, state)
        e = cond - uncond
        before = e if before is None else before
        surface = e - before + 5 * before
        length = surface.square().sum((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(out, cond + 3 * (e - 0.3 * surface / length))
        before = e
    torch.testing.assert_close(once(SMC(4.0, k=0.0))[0], once(CFG(4.0))[0])
    assert torch.equal(once(SMC(4.0), COND, COND)[0], COND)


def test_apg_mix_uses_the_scale_in_force() -> None:
    mix = APGMix(CFG(3.5), APG(11.0, momentum=-0.5), last=1)
    assert [mix.weight(step_info(X, i, 4)) for i in range(4)] == [3.5, 3.5, 11.0, 11.0]
    assert [mix.weight(step_info(X, i, 4, weight=6.0)) for i in (1, 2)] == [2.25, 6.0]
    off = APGMix(CFG(1.0), APG(4.0, momentum=-0.5), last=2)
    assert [len(off.plan(step_info(X, i, 4), None)) for i in range(4)] == [1, 1, 1, 2]
    assert torch.equal(Run(APGMix(CFG(2.0), APG(4.0, momentum=-0.5), -1)).out, Run(APG(4.0, momentum=-0.5)).out)
    assert torch.equal(Run(APGMix(CFG(2.0), APG(4.0), 99)).out, reference(CFG(2.0)).out)


# ---- dynamic thresholding ----


def test_dynamic_thresholding_by_hand() -> None:
    cond, uncond = torch.tensor([[[4.0, 0.0, -1.0, 1.0]]]), torch.zeros(1, 1, 4)
    # mean 1 per unit of scale; less that, (3, -1, -2, 0): at scale 2 they reach 6, at scale 4 12
    for guidance, want in (
        (DynamicThresholding(4.0, 2.0), [10.0, 2.0, 0.0, 4.0]),  # (12, -4, -8, 0) / 2 + 4
        (DynamicThresholding(4.0, 2.0, percentile=2 / 3), [10.0, 1.0, -2.0, 4.0]),  # T = 8: (8, -4, -8, 0) * 6 / 8 + 4
        (DynamicThresholding(4.0, 2.0, percentile=0.5), [10.0, 0.0, -2.0, 4.0]),  # T = 6: (6, -4, -6, 0) + 4
        (DynamicThresholding(4.0, 2.0, percentile=1 / 3), [10.0, 0.0, -2.0, 4.0]),  # R(g) = 4, T is 6 still
        (DynamicThresholding(4.0, 2.0, start="zero"), [8.0, 0.0, -2.0, 2.0]),
        (DynamicThresholding(4.0, 2.0, measure="std"), [10.0, 2.0, 0.0, 4.0]),
        (DynamicThresholding(4.0, 2.0, phi=0.5), [13.0, 1.0, -2.0, 4.0]),
        (DynamicThresholding(2.0, 2.0, percentile=0.5, start="zero"), [8.0, 0.0, -2.0, 2.0]),
        (DynamicThresholding(0.5, 2.0, measure="std"), [2.0, 0.0, -0.5, 0.5]),
    ):
        torch.testing.assert_close(once(guidance, cond, uncond)[0], torch.tensor([[want]]), msg=repr(guidance))


def test_dynamic_thresholding_of_constants_is_finite() -> None:
    one = torch.ones(2, 3, 4, 4)
    for measure in ("max", "std"):
        for start in ("mean", "zero"):
            made = DynamicThresholding(9.0, 2.0, 0.9, measure=measure, start=start)  # type: ignore[arg-type]
            assert torch.isfinite(once(made, one, 0 * one)[0]).all()
            assert torch.isfinite(once(made, 0 * one, 0 * one)[0]).all()


def test_quantile_is_that_of_torch() -> None:
    values = randn(5, 17)
    for q in (0.01, 0.5, 0.77, 0.98, 1.0):
        torch.testing.assert_close(quantile(values, q), torch.quantile(values, q, dim=1))


# ---- TCFG, RAAG ----


def test_damped_is_the_projection_by_svd() -> None:
    for shape in ((4, 30), (3, 4, 6, 5), (2, 3, 2, 4, 5)):
        c, u = randn(*shape, seed=1), 0.7 * randn(*shape, seed=1) + 0.5 * randn(*shape, seed=2)
        _, _, vh = torch.linalg.svd(torch.stack([c.flatten(1), u.flatten(1)], 1), full_matrices=False)
        lead = vh[:, 0]
        want = (u.flatten(1) * lead).sum(1, keepdim=True) * lead
        torch.testing.assert_close(damped(c, u), want.reshape(shape), rtol=1e-10, atol=1e-12)


def test_damped_at_the_edges() -> None:
    c = randn(2, 8)
    torch.testing.assert_close(damped(c, c), c)
    torch.testing.assert_close(damped(c, -2 * c), -2 * c)
    torch.testing.assert_close(damped(0 * c, c), c)
    assert torch.equal(damped(c, 0 * c), 0 * c)
    assert torch.equal(damped(0 * c, 0 * c), 0 * c)


def test_tcfg_at_pure_noise_is_the_limit() -> None:
    def at(alpha: float) -> Tensor:
        info = step_info(X)._replace(alpha=alpha, s=1 - alpha)
        return TCFG(5.0).combine(info, {"cond": COND, "uncond": UNCOND}, None)[0].denoised

    limit = at(0.0)
    assert (limit - COND).abs().max() > 1
    torch.testing.assert_close(at(1e-5), limit, rtol=0, atol=1e-3)
    assert torch.isfinite(Run(TCFG(3.0), "flow_euler", path=FLOW).out).all()


def test_raag_of_zero_predictions_is_finite() -> None:
    zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    x = torch.zeros(2, 3, 4)  # where the velocity is -D / s (alpha + s)
    for alpha in (0.0, 5.0):
        for cond, uncond in ((zero, zero), (one, zero), (one, one), (zero, one)):
            out = RAAG(7.0, alpha).combine(step_info(x), {"cond": cond, "uncond": uncond}, None)[0].denoised
            assert torch.isfinite(out).all()
    undefined = RAAG(7.0, 5.0).combine(step_info(x), {"cond": one, "uncond": zero}, None)[0].denoised
    torch.testing.assert_close(undefined, one)


# ---- stacks ----


@pytest.mark.parametrize(
    "made",
    [
        Rescaled(FDG((4.0, 2.0)), 0.5),
        NormMatched(Rescaled(TCFG(4.0)), cap=True),
        Rescaled(Adaptive(CFG(5.0), 0.98), 0.7),
        MomentumGuidance(NormMatched(Scheduled(RAAG(9.0), "lambda"), -2), 1.2),
        Interval(Rescaled(SMC(3.0)), 0.2, 2.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", [VE, FLOW], ids=["ve", "flow"])
def test_stacks_run(made: Guidance, path: noise.Path) -> None:
    out = Run(made, path=path).out
    assert torch.isfinite(out).all()
    assert (out - reference(NoGuidance(), path=path).out).abs().max() > 1e-3


def test_repr_has_the_order_of_a_call() -> None:
    assert repr(Rescaled(CFG(3.0), 0.5)) == "Rescaled(inner=CFG(scale=3.0), phi=0.5, space='v')"
    assert signature(NormMatched) == "NormMatched(inner, axis=None, cap=False, limit=1.0, space='flow')"


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rescaled(CFG(3.0), 1.2), r"Rescaled: phi=1\.2 must be a number from 0 to 1"),
        (lambda: Rescaled(CFG(3.0), space="image"), r"Rescaled: space='image' must be one of x0, eps, v, flow"),
        (lambda: NormMatched(CFG(3.0), 0), r"NormMatched: axis=0 must be None or an integer other than 0, the batch"),
        (lambda: NormMatched(CFG(3.0), True), r"NormMatched: axis=True must be"),
        (lambda: NormMatched(CFG(3.0), cap=1), r"NormMatched: cap=1 must be True or False"),
        (lambda: NormMatched(CFG(3.0), limit=0), r"NormMatched: limit=0 must be a number strictly between 0 and inf"),
        (lambda: MomentumGuidance(CFG(3.0), NAN), r"MomentumGuidance: scale=nan must be a finite number"),
        (lambda: MomentumGuidance(CFG(3.0), beta=1), r"MomentumGuidance: beta=1\.0 must be below 1"),
        (lambda: SMC(3.0, k=-1), r"SMC: k=-1 must be a number from 0"),
        (lambda: SMC(math.inf), r"SMC: scale=inf must be a finite number"),
        (lambda: RAAG(3.0, alpha=-1), r"RAAG: alpha=-1 must be a number from 0"),
        (lambda: TCFG("3"), r"TCFG: scale='3' must be a finite number"),
        (lambda: APGMix(CFG(3.0), APG(4.0), 1.5), r"APGMix: last=1\.5 must be an integer from -1 on"),
        (lambda: DynamicThresholding(3.0, percentile=0), r"DynamicThresholding: percentile=0\.0 must be above 0"),
        (lambda: DynamicThresholding(3.0, phi=2), r"DynamicThresholding: phi=2 must be a number from 0 to 1"),
        (lambda: DynamicThresholding(3.0, measure="AD"), r"DynamicThresholding: measure='AD' must be one of max, std"),
        (lambda: DynamicThresholding(3.0, start="MEAN"), r"DynamicThresholding: start='MEAN' must be one of mean, zero"),
        (lambda: DynamicThresholding(3.0, per_channel=1), r"DynamicThresholding: per_channel=1 must be True or False"),
    ],
)
def test_bad_argument_names_itself_and_what_works(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_apg_mix_takes_cfg_and_apg() -> None:
    with pytest.raises(TypeError, match=r"APGMix: first=APG.* must be CFG, for example CFG\(3\.0\)"):
        APGMix(APG(3.0), APG(4.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"APGMix: then=3\.0 must be APG"):
        APGMix(CFG(3.0), 3.0)  # type: ignore[arg-type]
