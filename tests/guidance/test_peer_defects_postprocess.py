"""What diffusers 0.42.1 and ComfyUI get wrong in the formulas of guidance: one test for each, so that it cannot happen here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import APG, CFG, COND, UNCOND, Branch, Guidance, Interval, NoGuidance, Result, StepInfo
from genkit.guidance.cfg_zero_star import CFGZeroStar
from genkit.guidance.fdg import FDG
from genkit.guidance.norm_matched import NormMatched
from genkit.guidance.raag import RAAG
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.tcfg import TCFG
from genkit.guidance.zero_init import ZeroInit
from genkit.noise import FLOW, VE, VP, Path
from tests.toys import MAIN, Run, conditions, reference, step_info


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def combined(guidance: Guidance, info: StepInfo, cond: Tensor, uncond: Tensor) -> Tensor:
    return guidance.combine(info, {"cond": cond, "uncond": uncond}, guidance.init(len(cond)))[0].denoised


def test_apg_has_the_form_of_its_paper() -> None:
    """diffusers' default is ``u + w update``: at w = 1 and eta = 0 that is not even the conditional prediction."""
    cond, uncond = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    delta = (cond - uncond).flatten(1)
    unit = cond.flatten(1) / cond.flatten(1).norm(dim=1, keepdim=True)
    across = (delta - (delta * unit).sum(1, keepdim=True) * unit).reshape(cond.shape)
    assert (uncond + across - cond).abs().max() > 0.1
    for scale in (1.0, 2.5, 9.0):
        torch.testing.assert_close(combined(APG(scale), step_info(cond), cond, uncond), cond + (scale - 1) * across)
    assert torch.equal(combined(APG(1.0), step_info(cond), cond, uncond), cond)


def apg_by_hand(cond: Tensor, uncond: Tensor) -> Tensor:
    c, d = cond.flatten(1), (cond - uncond).flatten(1)
    d = d * (2.0 / d.norm(dim=1, keepdim=True)).clamp_max(1)
    axis = c / c.norm(dim=1, keepdim=True)
    return (c + 3 * (d - (d * axis).sum(1, keepdim=True) * axis)).reshape(cond.shape)


def rescaled_by_hand(cond: Tensor, uncond: Tensor) -> Tensor:
    g = uncond + 4 * (cond - uncond)
    ratio = torch.stack([c.std() / one.std() for c, one in zip(cond, g, strict=True)])
    return g * (0.7 * ratio + 0.3).reshape(-1, 1, 1, 1)


def tcfg_by_hand(cond: Tensor, uncond: Tensor) -> Tensor:
    rows = torch.stack([cond.flatten(1), uncond.flatten(1)], 1)
    lead = torch.linalg.svd(rows, full_matrices=False)[2][:, 0]
    damped = (rows[:, 1] * lead).sum(1, keepdim=True) * lead
    return cond + 3 * (cond - damped.reshape(cond.shape))


@pytest.mark.parametrize(
    ("guidance", "by_hand", "space"),
    [
        (APG(4.0, threshold=2.0), apg_by_hand, "x0"),
        (Rescaled(CFG(4.0)), rescaled_by_hand, "v"),
        (Rescaled(CFG(4.0), space="x0"), rescaled_by_hand, "x0"),
        (TCFG(4.0), tcfg_by_hand, "eps"),
    ],
    ids=["APG", "Rescaled in v", "Rescaled in x0", "TCFG"],
)
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("sigma", [0.3, 4.0])
def test_rules_work_in_their_native_space(
    guidance: Guidance, by_hand: Callable[[Tensor, Tensor], Tensor], space: noise.Space, path: Path, sigma: float
) -> None:
    """There they act on whatever the network happens to predict."""
    alpha, s = path(sigma)
    x0, n = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    x = alpha * x0 + s * n
    cond, uncond = x0 + 0.3 * randn(2, 3, 4, 4, seed=3), x0 + 0.6 * randn(2, 3, 4, 4, seed=4)
    ours = combined(guidance, step_info(x, sigma=sigma, path=path), cond, uncond)
    for raw in noise.SPACES:
        at = (x, alpha, s, raw)
        by_raw = noise.to_x0(by_hand(noise.from_x0(cond, *at), noise.from_x0(uncond, *at)), *at)  # type: ignore[arg-type]
        if raw == space:
            torch.testing.assert_close(ours, by_raw)
        else:
            assert (ours - by_raw).abs().max() > 1e-6


@pytest.mark.parametrize("late", [Interval(APG(4.0, momentum=-0.5), 2, 9, "step"), Interval(APG(4.0, momentum=-0.5), 0.1, 1.0)])
def test_momentum_begins_wherever_guidance_does(late: Interval) -> None:
    """There the average is only made at step 0: a guider that starts later (Wan 2.2's second) has none."""
    run = Run(late, "euler")
    guided = [i for i, row in enumerate(run.guided.trace.rows) if row["rows"] == 8]
    assert 0 not in guided
    assert len(guided) > 2
    average = torch.zeros(())
    for i in guided:
        cond, uncond = run.main.outputs[i].split(4)
        average = cond - uncond - 0.5 * average
    torch.testing.assert_close(run.guided.state, average)
    assert (run.out - Run(Interval(APG(4.0), late.low, late.high, late.unit), "euler").out).abs().max() > 1e-3


def test_raag_takes_tensors_of_any_number_of_axes() -> None:
    """There ``torch.norm`` over three axes raises on images and videos."""
    cond, uncond, x = randn(2, 60, seed=1), randn(2, 60, seed=2), randn(2, 60, seed=3)
    want = combined(RAAG(9.0, 2.0), step_info(x), cond, uncond)
    assert (want - uncond.lerp(cond, 9.0)).abs().max() > 0.1
    for shape in ((2, 12, 5), (2, 3, 4, 5), (2, 3, 2, 2, 5), (2, 3, 2, 1, 2, 5)):
        ours = combined(RAAG(9.0, 2.0), step_info(x.reshape(shape)), cond.reshape(shape), uncond.reshape(shape))
        torch.testing.assert_close(ours, want.reshape(shape))


@pytest.mark.parametrize("size", [(104, 152), (13, 7), (64, 24), (5, 6, 11)])
def test_fdg_keeps_the_size_of_its_input(size: tuple[int, ...]) -> None:
    """There two sides that are no powers of two come back padded to the next ones."""
    cond, uncond = randn(1, 2, *size, seed=1), randn(1, 2, *size, seed=2)
    for parallel in (1.0, 0.5):
        ours = combined(FDG((10.0, 5.0, 2.0), parallel), step_info(cond), cond, uncond)
        assert ours.shape == cond.shape
    for level in (2.0, 7.0):  # no padding leaks in: equal scales are CFG up to the border
        ours = combined(FDG((level,) * 3), step_info(cond), cond, uncond)
        torch.testing.assert_close(ours, uncond + level * (cond - uncond))


def test_fdg_bands_start_and_stop_at_their_own_steps() -> None:
    """There a list of starts raises UnboundLocalError, and an integer TypeError."""
    cond, uncond = randn(1, 2, 8, 8, seed=1), randn(1, 2, 8, 8, seed=2)
    made = FDG((10.0, 5.0), start=(0, 0.5), stop=(0.5, 1))
    for i, alike in enumerate([(10.0, 1.0), (10.0, 1.0), (1.0, 5.0), (1.0, 5.0)]):
        want = combined(FDG(alike), step_info(cond), cond, uncond)
        torch.testing.assert_close(combined(made, step_info(cond, i, 4), cond, uncond), want)
    assert FDG((10, 5), start=0, stop=1) == FDG()
    never = FDG((10.0, 5.0), start=1)
    assert never.plan(step_info(cond, 3, 4), None) == (COND,)
    assert torch.equal(Run(never).out, reference(NoGuidance()).out)


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_tcfg_runs(path: Path) -> None:
    """There it raises AttributeError (``is_conditional``) as soon as it is used."""
    run = Run(TCFG(3.0), path=path)
    assert torch.isfinite(run.out).all()
    assert run.nfe == reference(CFG(3.0), path=path).nfe
    assert (run.out - reference(CFG(3.0), path=path).out).abs().max() > 1e-3


@dataclass(frozen=True)
class _Zero(Guidance):
    """A velocity of 0 in the first step, although both branches have been evaluated; then CFG."""

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return COND, UNCOND

    def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
        if info.index:
            return CFG(3.0).combine(info, predictions, None)
        return Result(noise.to_x0(torch.zeros_like(info.x), info.x, info.alpha, info.s, "flow")), state


@pytest.mark.parametrize("inner", [ZeroInit(CFGZeroStar(3.0), 2), _Zero()], ids=["ZeroInit", "evaluated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_a_zero_velocity_stays_zero(inner: Guidance, dtype: torch.dtype, sigma: float) -> None:
    """There CFG-Zero* with a rescale divides 0 by 0 in the steps that stand still; so do models that match norms."""
    x = (sigma * randn(4, 2, 2, 1, seed=1)).to(dtype)
    alpha, s = FLOW(sigma)
    for made in (
        Rescaled(inner, space="flow"),
        Rescaled(inner, 1.0, space="flow"),
        NormMatched(inner),
        NormMatched(inner, -1),
        NormMatched(inner, cap=True),
    ):
        guided = Guided(MAIN, made, conditions(torch.tensor([0, 1, 2, 0])), 4)
        out = guided(step_info(x, 0, 3, sigma, FLOW)).denoised
        velocity = noise.from_x0(out, x, alpha, s, "flow")
        assert torch.isfinite(out).all()
        assert velocity.abs().max() < 1e-6, repr(made)
        assert torch.isfinite(Run(made, "flow_euler", path=FLOW).out).all()


def test_apg_that_keeps_all_is_cfg_at_the_same_scale() -> None:
    """ComfyUI's ``c + w update`` is CFG at w + 1."""
    cond, uncond = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    for scale in (0.0, 1.0, 3.0, 7.5):
        ours = combined(APG(scale, eta=1.0), step_info(cond), cond, uncond)
        torch.testing.assert_close(ours, uncond + scale * (cond - uncond))
