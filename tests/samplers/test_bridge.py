"""Schedulers of diffusers inside the loop give what their own loops give."""

import math

import pytest
import torch

from genkit.denoiser import Guided
from genkit.guidance import CFG, Interval
from genkit.noise import FLOW, VE, VP, from_x0
from genkit.random import Fixed, Gaussian, StudentT
from genkit.samplers import sample
from genkit.samplers.diffusion.bridge import from_diffusers
from tests.gaussians import TRIANGLE, Gaussians, Mixture, solve

diffusers = pytest.importorskip("diffusers")

STEPS = 10
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
EXACT = {**BETAS, "clip_sample": False}
V = {"prediction_type": "v_prediction"}
SCHEDULERS = [
    ("DDIM", EXACT), ("DDIM", {**EXACT, **V, "rescale_betas_zero_snr": True}), ("DDIM", {**EXACT, "prediction_type": "sample"}),
    ("DDPM", EXACT), ("PNDM", {**BETAS, "skip_prk_steps": True}), ("LCM", EXACT), ("TCD", EXACT),
    ("EulerDiscrete", BETAS), ("EulerDiscrete", {**BETAS, **V}), ("EulerAncestralDiscrete", BETAS), ("HeunDiscrete", BETAS),
    ("LMSDiscrete", BETAS), ("DPMSolverMultistep", BETAS), ("DPMSolverMultistep", {**BETAS, **V}),
    ("DPMSolverMultistep", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestep", {**BETAS, "lower_order_final": True}),
    ("UniPCMultistep", BETAS), ("DEISMultistep", BETAS), ("SASolver", BETAS),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}), ("FlowMatchHeunDiscrete", {}), ("FlowMatchLCM", {}),
    ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]  # fmt: skip
MODEL = {p: Mixture(TRIANGLE, 0.5, path=VP if p == VE else p) for p in (VE, VP, FLOW)}  # regular at sigma = inf
SEEDS = [5, 1, 9]


def make(name, config):
    config = {k: v for k, v in config.items() if not (k == "timestep_spacing" and name in ("DPMSolverSinglestep",))}
    return getattr(diffusers, f"{name}Scheduler")(**config)


def network(scheduler, x, t, i, flow):
    """What a network trained for the scheduler would predict at its input x, timestep t, call i: from the tables of training."""
    if flow:
        s = float(scheduler.sigmas[i])
        alpha = 1 - s
    else:
        abar = float(scheduler.alphas_cumprod[round(float(t))])
        alpha, s = math.sqrt(abar), math.sqrt(1 - abar)
    model = Mixture(TRIANGLE, 0.5, path=FLOW if flow else VP)
    denoised = model(x, torch.full((len(x),), s / alpha if alpha else math.inf, dtype=torch.float64), None)
    kind = "flow" if flow else {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[scheduler.config.prediction_type]
    return from_x0(denoised, x, alpha, s, kind)


def own_loop(scheduler, noise, generators):
    """A pipeline's loop."""
    flow = "Flow" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))
    scheduler.set_timesteps(STEPS)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):
        model_input = x if flow else scheduler.scale_model_input(x, t)
        output = network(scheduler, model_input, t, i, flow)
        extra = {"generator": list(generators)} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(output, t, x, **extra).prev_sample.double()
    return x


def start():
    return Gaussian(SEEDS)(torch.empty(3, 2, dtype=torch.float64))


def run(bridge, noise=None, seeds=SEEDS):
    x = bridge.start(Gaussian(seeds)(torch.empty(len(seeds), 2, dtype=torch.float64)))
    return solve(MODEL[bridge.path], x, bridge.sigmas, bridge.sampler, bridge.path, noise=noise)


@pytest.mark.parametrize(
    "case", SCHEDULERS, ids=lambda c: f"{c[0]}-{c[1].get('prediction_type', '')}{c[1].get('algorithm_type', '')}"
)
def test_it_is_the_scheduler(case):
    expected = own_loop(make(*case), start(), Gaussian(SEEDS, stream=1).generators)
    bridge = from_diffusers(make(*case), STEPS)
    found = run(bridge, noise=Gaussian(SEEDS, stream=1))
    # Heun and flow schedulers round their levels to float32, tables of training do not
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)
    again = run(bridge, noise=Gaussian(SEEDS, stream=1))
    assert torch.equal(again, found)  # the run before left nothing behind
    falling = bridge.sigmas[1:] < bridge.sigmas[:-1]
    assert falling.all()
    assert bridge.sampler.path is bridge.path


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        (("EulerDiscrete", BETAS), "euler"),
        (("HeunDiscrete", BETAS), "heun"),
        (("DPMSolverMultistep", {**BETAS, "final_sigmas_type": "zero", "use_karras_sigmas": True}), "dpmpp_2m"),
        (("FlowMatchEulerDiscrete", {}), "flow_euler"),
        (("FlowMatchHeunDiscrete", {}), "flow_heun"),
    ],
    ids=lambda c: c if isinstance(c, str) else "",
)
def test_it_agrees_with_our_own_sampler(case, ours):
    bridge = from_diffusers(make(*case), STEPS)
    x = bridge.start(start())
    expected = solve(MODEL[bridge.path], x, bridge.sigmas, ours, bridge.path)
    torch.testing.assert_close(run(bridge), expected, rtol=1e-4, atol=1e-4)


def test_sde_with_given_noise_is_our_own():
    """sde-dpmsolver++ of second order, midpoint, is dpmpp_2m_sde with eta = 1."""
    config = {**BETAS, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "final_sigmas_type": "zero"}
    bridge = from_diffusers(make("DPMSolverMultistep", config), STEPS)
    drawn = Fixed(torch.randn(STEPS, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ours = solve(MODEL[VP], bridge.start(start()), bridge.sigmas, "dpmpp_2m_sde", VP, noise=drawn)
    torch.testing.assert_close(run(bridge, noise=drawn), ours, rtol=1e-4, atol=1e-4)


def test_options_of_the_step():
    """DDIM with eta is ours, on the levels it really steps between."""
    scheduler = make("DDIM", EXACT)
    bridge = from_diffusers(scheduler, STEPS, eta=0.7)
    drawn = Fixed(torch.randn(STEPS, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ours = solve(MODEL[VP], bridge.start(start()), bridge.sigmas, "ddim(eta=0.7)", VP, noise=drawn)
    torch.testing.assert_close(run(bridge, noise=drawn), ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"EulerAncestralDiscreteScheduler.step has no option 'eta'"):
        from_diffusers(diffusers.EulerAncestralDiscreteScheduler(), STEPS, eta=0.5)


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "DDPM", "LCM"])
def test_a_sample_does_not_depend_on_its_batch(name):
    bridge = from_diffusers(make(name, EXACT if name != "EulerAncestralDiscrete" else BETAS), STEPS)
    whole = run(bridge, noise=Gaussian(SEEDS, 1))
    parts = [run(bridge, noise=Gaussian([s], 1), seeds=[s]) for s in SEEDS]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "config", "steps"), [("HeunDiscrete", BETAS, 2 * STEPS - 1), ("UniPCMultistep", BETAS, STEPS)])
def test_guidance_sees_steps_and_stages(name, config, steps):
    """An interval in sigma holds for whole steps, also those of two calls."""
    bridge = from_diffusers(make(name, config), STEPS)
    labels = torch.zeros(3, dtype=torch.long)
    conditions = {"cond": labels, "uncond": labels + 1}
    guided = Guided(Gaussians([0.5, 0.0], [0.2, 0.4]), Interval(CFG(3.0), 0.5, 3.0), conditions, 3)
    seen = []
    sample(guided, bridge.start(start()), bridge.sigmas, bridge.sampler, bridge.path, callback=lambda i, r: seen.append(i.sigma))
    assert seen == bridge.sigmas[:-1].tolist()
    rows = guided.trace.rows
    assert len(rows) == steps
    assert all((r["branches"] == "cond+uncond") == (0.5 < r["sigma"] <= 3.0) for r in rows)
    assert {r["branches"] for r in rows} == {"cond", "cond+uncond"}
    assert {r["stage"] for r in rows} == ({"step", "second"} if steps > STEPS else {"step"})


def test_timesteps_made_before_are_kept():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    bridge = from_diffusers(scheduler)
    torch.testing.assert_close(bridge.sigmas, torch.tensor([9.0, 1.0, 0.25, 0.0], dtype=torch.float64), rtol=1e-5, atol=1e-6)
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="is in the middle of a run"):
        from_diffusers(scheduler)
    with pytest.raises(ValueError, match="has no timesteps: give steps"):
        from_diffusers(make("DDIM", EXACT))


def test_refusals():
    with pytest.raises(ValueError, match=r"interpolated level.*use HeunDiscreteScheduler"):
        from_diffusers(diffusers.KDPM2DiscreteScheduler(), STEPS)
    with pytest.raises(ValueError, match="skip_prk_steps=True"):
        from_diffusers(diffusers.PNDMScheduler(), STEPS)
    with pytest.raises(ValueError, match="its step also wants the estimate before"):
        from_diffusers(diffusers.CogVideoXDPMScheduler(), STEPS)
    bridge = from_diffusers(make("EulerAncestralDiscrete", BETAS), STEPS)
    with pytest.raises(ValueError, match="noise=None, but this scheduler draws noise by itself"):
        run(bridge)
    with pytest.raises(ValueError, match="noise=StudentT, but this scheduler draws noise by itself"):
        run(bridge, noise=StudentT(SEEDS, 4.0))
    with pytest.raises(ValueError, match="sigmas do not belong to this EulerAncestralDiscreteScheduler"):
        solve(MODEL[VE], start(), torch.tensor([3.0, 1.0, 0.0]), bridge.sampler, VE, noise=Gaussian(SEEDS, 1))


def test_quiet_schedulers_need_and_touch_no_noise():
    before = torch.get_rng_state()
    bridge = from_diffusers(make("DDIM", EXACT), STEPS)
    source = Gaussian(SEEDS, 1)
    assert torch.equal(run(bridge), run(bridge, noise=source))
    assert torch.equal(source(torch.empty(3, 2)), Gaussian(SEEDS, 1)(torch.empty(3, 2)))
    assert torch.equal(torch.get_rng_state(), before)
