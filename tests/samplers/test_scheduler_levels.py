"""(alpha, s) of a scheduler: x0 from them is the x0 the scheduler itself works with."""

import pytest
import torch

from genkit.noise import from_x0, to_x0
from genkit.samplers.diffusion.scheduler_levels import STATES, levels, prediction_space, state_of

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = {**BETAS, "use_karras_sigmas": True}
V = {**BETAS, "prediction_type": "v_prediction"}
X0 = {**BETAS, "prediction_type": "sample"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EXACT = {"clip_sample": False}
PREDICTING = [  # schedulers whose step returns pred_original_sample
    ("DDIM", {**BETAS, **EXACT}), ("DDIM", {**V, **EXACT}), ("DDIM", {**X0, **EXACT}),
    ("DDIM", {**V, **EXACT, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DDPM", {**BETAS, **EXACT}), ("DDPM", {**V, **EXACT}), ("CogVideoXDDIM", {**V, **EXACT}),
    ("EulerDiscrete", BETAS), ("EulerDiscrete", KARRAS), ("EulerDiscrete", {**V, "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscrete", BETAS), ("EulerAncestralDiscrete", V),
    ("HeunDiscrete", BETAS), ("HeunDiscrete", {**V, "use_karras_sigmas": True}),
    ("LMSDiscrete", BETAS), ("LMSDiscrete", KARRAS),
]  # fmt: skip
CONVERTING = [  # schedulers that turn the output into x0 in convert_model_output
    ("DPMSolverMultistep", BETAS), ("DPMSolverMultistep", {**V, "use_karras_sigmas": True}), ("DPMSolverMultistep", FLOW),
    ("DPMSolverSinglestep", {**BETAS, "lower_order_final": True}), ("UniPCMultistep", KARRAS), ("UniPCMultistep", FLOW),
    ("UniPCMultistep", V), ("SASolver", BETAS),
]  # fmt: skip


def make(name, config):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(6)
    return scheduler


def start(scheduler):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=g) * float(getattr(scheduler, "init_noise_sigma", 1.0)), g


def own_x0(scheduler, model_input, output, t):
    alpha, s = levels(scheduler, t)
    return to_x0(output.double(), model_input.double(), alpha, s, prediction_space(scheduler))


@pytest.mark.parametrize("case", PREDICTING, ids=str)
def test_x0_is_that_of_the_scheduler(case):
    """At every call, in the second stages too."""
    scheduler = make(*case)
    x, g = start(scheduler)
    extra = {"generator": g} if "Ancestral" in case[0] or case[0] in ("DDPM", "TCD") else {}
    extra = {"generator": g} if "Ancestral" in case[0] or case[0] == "DDPM" else {}
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        output = torch.randn(x.shape, generator=g)
        expected = own_x0(scheduler, model_input, output, t)
        step = scheduler.step(output, t, x, **extra)
        torch.testing.assert_close(expected.float(), step.pred_original_sample, rtol=2e-5, atol=2e-4)
        x = step.prev_sample


@pytest.mark.parametrize("case", CONVERTING, ids=str)
def test_x0_is_what_the_scheduler_converts_to(case):
    scheduler = make(*case)
    x, g = start(scheduler)
    convert, seen = scheduler.convert_model_output, []
    scheduler.convert_model_output = lambda *args, **kwargs: seen.append(convert(*args, **kwargs)) or seen[-1]
    for t in scheduler.timesteps:
        output = torch.randn(x.shape, generator=g)
        expected = own_x0(scheduler, scheduler.scale_model_input(x, t), output, t)
        seen.clear()
        x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(expected.float(), seen[0], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"])
def test_flow_levels_are_the_time(name):
    """A step along the exact velocity of a point mass ends on the straight line to it."""
    scheduler = make(name, {"shift": 3.0})
    x, g = start(scheduler)
    x0, n = torch.full_like(x, 0.7), x.clone()
    for i, t in enumerate(scheduler.timesteps):
        alpha, s = levels(scheduler, t)
        assert alpha == pytest.approx(1 - float(scheduler.sigmas[i]))
        assert alpha + s == pytest.approx(1)
        if name != "FlowMatchLCM":
            torch.testing.assert_close(x, alpha * x0 + s * n, rtol=1e-5, atol=1e-5)
        output = from_x0(x0, x, alpha, s, prediction_space(scheduler))
        x = scheduler.step(output, t, x, generator=g).prev_sample
    torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerDiscrete", "DDIM", "FlowMatchEulerDiscrete"])
def test_before_the_first_step_the_timestep_decides(name):
    """And a pipeline that begins in the middle says so with set_begin_index."""
    scheduler = make(name, {})
    found = [levels(scheduler, t) for t in scheduler.timesteps]
    assert len(set(found)) == 6
    assert [s / a if a else float("inf") for a, s in found] == sorted(
        (s / a if a else float("inf") for a, s in found), reverse=True
    )
    if name != "DDIM":
        scheduler.set_begin_index(2)
        assert levels(scheduler, scheduler.timesteps[2]) == found[2]


def test_refusals_give_the_reason():
    with pytest.raises(ValueError, match=r"KDPM2DiscreteScheduler cannot be used: .*interpolated level.*use HeunDiscrete"):
        levels(diffusers.KDPM2DiscreteScheduler(), 1)
    with pytest.raises(ValueError, match=r"EDMEulerScheduler cannot be used: it applies c_skip"):
        state_of(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"RePaintScheduler is not known to genkit; use one of DDIMScheduler"):
        state_of(diffusers.RePaintScheduler())
    with pytest.raises(ValueError, match=r"timestep=1e\+06 is not in scheduler.timesteps, which begin"):
        levels(make("DPMSolverMultistep", {}), 1e6)
    broken = diffusers.DDIMScheduler()
    broken.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match=r"prediction_type='score': genkit knows epsilon"):
        prediction_space(broken)


def test_every_known_name_exists():
    assert [name for name in STATES if not hasattr(diffusers, f"{name}Scheduler")] == []


def test_subclasses_are_known_by_their_parent():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    assert state_of(Mine()) == "ve"
    assert state_of(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)) == "flow"
