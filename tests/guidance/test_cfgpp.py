"""CFG++: trajectories of the authors' samplers, and the schedule of weights that stands for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import CFG, NoGuidance, Result, Scheduled, StepInfo
from genkit.guidance.cfgpp import CFGPP
from genkit.guidance.sum import Sum
from genkit.noise import FLOW, VE, VP, Path
from genkit.samplers.diffusion import SAMPLERS, sample
from tests.toys import MAIN, Mixture, Run, conditions, golden, reference, step_info

ARRAYS, META = golden("guidance/cfgpp")
CASES = [pytest.param(case, id=case["key"]) for case in META["cases"]]
SOLVERS = {"ddim": "ddim", "euler": "euler", "dpm++_2m": "dpmpp_2m"}


class Recorded:
    """The noise model of the recorded runs as a denoiser: it knows 1000 levels, and is asked at the one nearest to sigma."""

    path = VE

    def __init__(self, key: str) -> None:
        self.mixture, self.times = Mixture.from_golden(ARRAYS), torch.from_numpy(ARRAYS[f"{key}__t"])
        self.abar = torch.from_numpy(ARRAYS["alphas_cumprod"]).double()[self.times]
        self.levels = ((1 - self.abar) / self.abar).sqrt()
        recorded = ARRAYS[f"{key}__sigmas"]
        self.sigmas = torch.from_numpy(recorded).double() if len(recorded) else torch.cat([self.levels, torch.zeros(1)])

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        i = int((self.sigmas - sigma[0]).abs().argmin())
        s, abar, at = self.sigmas[i], self.abar[i], self.levels[i]
        x_in = x / (1 + s**2).sqrt()
        clean = self.mixture(x_in / abar.sqrt(), at.expand(len(x)), condition)
        return x - s * (x_in - abar.sqrt() * clean) / (1 - abar).sqrt()


def trajectory(case: dict[str, Any], form: Any = "renoise") -> tuple[Tensor, Tensor]:
    """Inputs of the model at every step, at VP scale, and the end of a run."""
    key, plus = case["key"], "cfg++" in case["solver"]
    guidance = CFGPP(case["cfg_guidance"], form) if plus else CFG(case["cfg_guidance"])
    model, seen = Recorded(key), []
    labels = torch.from_numpy(ARRAYS["labels"])
    start = torch.from_numpy(ARRAYS[f"{key}__x_in"][0]).double() * (1 + model.sigmas[0] ** 2).sqrt()
    guided = Guided(model, guidance, conditions(labels), len(labels))
    solver = SAMPLERS[SOLVERS[case["solver"].removesuffix("_cfg++")]]
    end = sample(guided, start, model.sigmas, solver, VE, callback=lambda i, _: seen.append(i.x / (1 + i.sigma**2) ** 0.5))
    return torch.stack(seen), end


@pytest.mark.parametrize("case", CASES)
def test_recorded_trajectories(case: dict[str, Any]) -> None:
    seen, end = trajectory(case)
    torch.testing.assert_close(seen.float(), torch.from_numpy(ARRAYS[f"{case['key']}__x_in"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.float(), torch.from_numpy(ARRAYS[f"{case['key']}__final_latent"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if "cfg++" in c.values[0]["solver"] and "dpm" not in c.values[0]["solver"]])
def test_the_schedule_gives_the_recorded_trajectories_too(case: dict[str, Any]) -> None:
    seen, end = trajectory(case, "schedule")
    hook_seen, hook_end = trajectory(case)
    torch.testing.assert_close(seen, hook_seen, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, hook_end, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end.float(), torch.from_numpy(ARRAYS[f"{case['key']}__final_latent"]), rtol=1e-5, atol=1e-5)


def test_recorded_plain_and_plus_runs_differ() -> None:
    """The tolerance above tells CFG++ from CFG of the same strength."""
    for solver in SOLVERS:
        one, plus = (ARRAYS[f"{solver}{k}__final_latent"] for k in ("_cfg++_w0.6", "_cfg++_w1"))
        assert np.abs(one - plus).max() > 1e-2


# ---- the two forms ----


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0, 1.4])
def test_both_forms_agree_in_first_order_solvers(sampler: str, strength: float, path: Path) -> None:
    hook, schedule = Run(CFGPP(strength), sampler, path=path), Run(CFGPP(strength, "schedule"), sampler, path=path)
    torch.testing.assert_close(hook.out, schedule.out, rtol=1e-10, atol=1e-10)
    assert hook.nfe == schedule.nfe == [12] * 4


def test_both_forms_agree_under_a_schedule_of_their_scale() -> None:
    for wrap in (lambda g: Scheduled(g, "sine"), lambda g: Sum(g, CFG(1.5))):
        a, b = Run(wrap(CFGPP(0.6)), "euler"), Run(wrap(CFGPP(0.6, "schedule")), "euler")
        torch.testing.assert_close(a.out, b.out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_solvers_tell_the_forms_apart(sampler: str) -> None:
    assert (Run(CFGPP(0.6), sampler).out - Run(CFGPP(0.6, "schedule"), sampler).out).abs().max() > 1e-3


def test_weights_of_the_schedule() -> None:
    """w_i = lambda sigma / (sigma - sigma'), seen as the factor that CFG would need; lambda itself in the last step."""
    one = torch.ones(1, 1)
    for sigma, sigma_next in ((4.0, 3.0), (4.0, 1.0), (0.5, 0.0), (float("inf"), 10.0)):
        info = step_info(one, sigma=1.0)._replace(sigma=sigma, sigma_next=sigma_next)
        got = CFGPP(0.6, "schedule").combine(info, {"cond": one, "uncond": 0 * one}, None)[0]
        want = 0.6 if sigma == float("inf") else 0.6 * sigma / (sigma - sigma_next)
        assert float(got.denoised) == pytest.approx(want)
        assert got.direction is None


# ---- the rule ----


def test_the_step_written_out() -> None:
    """x' = D_lambda + sigma' (x - D_u) / sigma, on the exact model."""
    seen: list[tuple[float, float, Tensor]] = []
    guided = Guided(MAIN, CFGPP(0.7), conditions(torch.tensor([0, 1])), 2)
    start = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 2, 2, 1)
    sigmas = torch.tensor([3.0, 1.5, 0.6, 0.2], dtype=torch.float64)
    out = sample(guided, start, sigmas, "euler", VE, callback=lambda i, _: seen.append((i.sigma, i.sigma_next, i.x)))
    x = start
    for sigma, sigma_next, at in seen:
        torch.testing.assert_close(at, x, rtol=1e-12, atol=1e-12)
        level = torch.full((2,), sigma, dtype=torch.float64)
        cond, uncond = MAIN(x, level, torch.tensor([0, 1])), MAIN(x, level, torch.tensor([-1, -1]))
        x = uncond + 0.7 * (cond - uncond) + sigma_next * (x - uncond) / sigma
    torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "ddim", "euler_ancestral"])
def test_every_path_gives_the_same_image(sampler: str) -> None:
    ends = [Run(CFGPP(0.6), sampler, path=path).out for path in (VE, VP, FLOW)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_a_direction_that_is_the_estimate_changes_nothing(sampler: str) -> None:
    class _Doubled(CFG):
        def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
            result, state = super().rule(info, predictions, state)
            return result._replace(direction=result.denoised), state

    torch.testing.assert_close(Run(_Doubled(3.0), sampler).out, reference(CFG(3.0), sampler).out, rtol=1e-10, atol=1e-10)


def test_what_strength_and_scale_mean() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)

    def rule(made: CFGPP, **changes: Any) -> tuple[float, float]:
        result = made.combine(step_info(one, **changes), {"cond": one, "uncond": 0 * one}, None)[0]
        assert result.direction is not None
        return round(float(result.denoised), 12), round(float(result.direction), 12)

    assert rule(CFGPP(0.6)) == (0.6, 0.0)  # D_u + 0.6 d, and D_u
    assert rule(CFGPP(1.0)) == (1.0, 0.0)  # the full conditional estimate, still renoised along D_u
    assert rule(CFGPP(0.6, scale=1.5)) == rule(CFGPP(0.6), weight=1.5) == (0.8, 0.5)  # half the way from no guidance
    plain = CFGPP(0.6).combine(step_info(one, weight=1.0), {"cond": one}, None)[0]
    assert torch.equal(plain.denoised, one)
    assert plain.direction is None


def test_strength_0_samples_unconditionally() -> None:
    run = Run(CFGPP(0.0), "euler")
    torch.testing.assert_close(run.out, reference(CFG(0.0), "euler").out, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(run.out, reference(NoGuidance(), "euler").out, atol=1e-2)


def test_hosts_are_asked_for_a_direction_only_where_it_is_used() -> None:
    assert CFGPP(0.6).needs == {"direction"}
    assert CFGPP(0.6, "schedule").needs == frozenset()
    assert Sum(CFG(2.0), CFGPP(0.6)).needs == {"direction"}


def test_errors() -> None:
    with pytest.raises(ValueError, match="CFGPP: form='both' must be 'renoise' or 'schedule'"):
        CFGPP(0.6, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength=nan must be a finite number"):
        CFGPP(float("nan"))
