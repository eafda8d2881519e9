"""Faults of other implementations (diffusers 0.42.1 unless said otherwise) that the methods here must not have."""

from __future__ import annotations

import pytest
import torch

from genkit import noise
from genkit.guidance import APG, CFG, Interval, NoGuidance
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.cfg_zero_star import CFGZeroStar, optimal_scale
from genkit.guidance.cfgpp import CFGPP
from genkit.guidance.piecewise import Piecewise
from genkit.guidance.rectified_cfgpp import RectifiedCFGPP
from genkit.guidance.reuse_delta import ReuseDelta
from genkit.guidance.sum import Sum
from genkit.guidance.zero_init import ZeroInit
from genkit.noise import FLOW
from tests.toys import LABELS, Run, reference, step_info


def test_scale_1_is_the_conditional_prediction_in_every_form() -> None:
    """Their default forms add w times the update to the unconditional prediction: at w = 1 some give neither branch."""
    one = torch.ones(2, 3)
    for made in (CFGZeroStar(1.0), CFGPP(0.6, scale=1.0), Autoguidance(1.0), ReuseDelta(1.0), RectifiedCFGPP(1.0)):
        assert torch.equal(made.combine(step_info(one), {"cond": one}, made.init(2))[0].denoised, one)


def test_the_second_of_two_networks_has_its_momentum() -> None:
    """Theirs is made at step 0 only, so that the guider of Wan 2.2's second network runs without, silently."""
    made = Piecewise((CFG(4.0), APG(3.0, eta=1.0, momentum=-0.5)), (1,), "step")
    plain = Piecewise((CFG(4.0), APG(3.0, eta=1.0)), (1,), "step")
    with_it, without = Run(made, "euler"), Run(plain, "euler")
    assert not torch.allclose(with_it.out, without.out, atol=1e-3)
    assert with_it.guided.state[1] is not None


def test_the_first_step_can_be_covered() -> None:
    """Theirs compares with 0 < step: start = 0 never takes in step 0."""
    made = Sum(CFG(2.0), Piecewise((Autoguidance(3.0), NoGuidance()), (2,), "step"))
    rows = [row["branches"] for row in Run(made, "euler").guided.trace.rows]
    assert rows == ["cond+uncond+weak"] * 2 + ["cond+uncond"] * 4


def test_the_extra_branch_keeps_its_condition_without_cfg() -> None:
    """With classifier-free guidance off, their third branch is handed the negative prompt."""
    run = Run(Sum(CFG(1.0), Autoguidance(2.0)), "euler")
    assert run.weak.labels == [LABELS.tolist()] * 6
    assert run.main.labels == [LABELS.tolist()] * 6


def test_autoguidance_is_by_a_second_model() -> None:
    """Theirs drops layers of the same model and takes the negative prompt."""
    run = Run(Autoguidance(2.0))
    assert run.weak.labels == [LABELS.tolist()] * 11
    assert run.guided.ledger.calls == 22
    worse, main = run.weak.outputs[0], run.main.outputs[0]
    assert not torch.allclose(worse, main, atol=1e-3)


@pytest.mark.parametrize(("low", "high"), [(2, 5), (0, 3)])
def test_a_switch_on_or_off_within_the_run_finds_its_branch(low: int, high: int) -> None:
    """Two of their pipelines encode prompts for the branches of step 0, or of the last step of the run before."""
    made = Piecewise((NoGuidance(), CFG(3.0), NoGuidance()), (low, high + 1), "step")
    runs = [Run(made), Run(made)]
    assert torch.equal(runs[0].out, runs[1].out)
    assert torch.equal(runs[0].out, Run(Interval(CFG(3.0), low, high, "step")).out)
    assert runs[0].nfe == runs[1].nfe == [11 + sum(2 - (i == 5) for i in range(low, high + 1))] * 4


def test_still_steps_evaluate_nothing_and_give_numbers() -> None:
    """Theirs runs both branches on the steps whose prediction it then replaces by zeros, and a rule after it divides 0 by 0."""
    run = Run(ZeroInit(CFGZeroStar(4.0), 2), "euler")
    assert run.nfe == [8] * 4
    assert torch.isfinite(run.out).all()
    x = torch.full((1, 2), 3.0)
    still = ZeroInit(CFGZeroStar(4.0)).combine(step_info(x, 0, 5), {}, None)[0].denoised
    assert float(still.std()) == 0
    assert torch.equal(still, x / 2)  # an image, not 0


def test_the_optimal_scale_is_applied_where_it_is_measured() -> None:
    """ComfyUI measures it on velocities and applies it to the clean-image estimate (ComfyUI#7559)."""
    generator = torch.Generator().manual_seed(3)
    x, c, u = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    info = step_info(x, sigma=1.5, path=FLOW)
    estimate = {n: noise.to_x0(v, x, info.alpha, info.s, "flow") for n, v in (("cond", c), ("uncond", u))}
    out = CFGZeroStar(4.0).combine(info, estimate, None)[0].denoised
    a = (c * u).sum(1, keepdim=True) / (u.square().sum(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(noise.from_x0(out, x, info.alpha, info.s, "flow"), a * u + 4 * (c - a * u))
    mixed = a * estimate["uncond"] + 4 * (estimate["cond"] - a * estimate["uncond"])
    assert not torch.allclose(out, mixed, atol=0.1)
    torch.testing.assert_close(optimal_scale(c, u), a)


def test_methods_can_be_stacked() -> None:
    """Each of their guiders brings its own CFG, so that two cannot be combined."""
    both = Run(Sum(APG(4.0, momentum=-0.5), Autoguidance(2.0)), "euler")
    assert both.nfe == [18] * 4
    for one in (APG(4.0, momentum=-0.5), Autoguidance(2.0)):
        assert not torch.allclose(both.out, reference(one, "euler").out, atol=1e-3)


def test_cfgpp_needs_no_other_solver() -> None:
    """Theirs was dropped because it would need changes in every scheduler: the weights of the schedule do it in Euler's."""
    plain, hook = Run(CFGPP(0.6, "schedule"), "euler"), Run(CFGPP(0.6), "euler")
    assert CFGPP(0.6, "schedule").needs == frozenset()
    torch.testing.assert_close(plain.out, hook.out, rtol=1e-10, atol=1e-10)
