"""Own samplers equal the schedulers of diffusers on the same noise levels, with an exact denoiser.

DDIM's tables are lifted to float64, so it agrees to rounding; the others cast levels and samples to float32 inside.
"""

import pytest
import torch

from genkit.noise import FLOW, VE, VP
from genkit.random import Fixed
from tests.gaussians import TRIANGLE, Mixture, solve

diffusers = pytest.importorskip("diffusers")

STEPS = 12
FLOAT32 = 2e-5  # a dozen float32 steps on values of order 1 (x starts at about 15 on the ve path)
MODEL = Mixture(TRIANGLE, 0.5)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(sigma, x):
    return torch.full((len(x),), float(sigma), dtype=torch.float64)


def eps(x, sigma):
    """The epsilon prediction at a ve state."""
    return (x - MODEL(x, rows(sigma, x), None)) / sigma


def levels(scheduler):
    """The distinct noise levels (Heun lists the inner ones twice)."""
    return torch.unique_consecutive(scheduler.sigmas).double()


def run_ve(scheduler, x, **options):
    """The loop of a pipeline over a scheduler in ve coordinates; the evaluation point is sigmas[step_index]."""
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(eps(x, scheduler.sigmas[i].double()), t, x, **options).prev_sample.double()
    return x


@pytest.mark.parametrize("spacing", [{"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}], ids=["karras", "trailing"])
@pytest.mark.parametrize(("ours", "theirs"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_euler_and_heun(ours, theirs, spacing):
    scheduler = getattr(diffusers, theirs)(**BETAS, **spacing)
    scheduler.set_timesteps(STEPS)
    sigmas = levels(scheduler)
    assert len(sigmas) == STEPS + 1
    x = sigmas[0] * noise(4, 2)
    torch.testing.assert_close(solve(MODEL, x, sigmas, ours), run_ve(scheduler, x), rtol=FLOAT32, atol=FLOAT32)


def test_euler_ancestral():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = scheduler.sigmas[0].double() * noise(4, 2)
    theirs = run_ve(scheduler, x, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    drawn = Fixed(torch.stack([torch.randn(4, 2, generator=g, dtype=torch.float64) for _ in range(STEPS)]))
    ours = solve(MODEL, x, scheduler.sigmas, "euler_ancestral", noise=drawn)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, prediction_type="sample")
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod.double(),
        scheduler.final_alpha_cumprod.double(),
    )
    a = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    sigmas, drawn = ((1 - a) / a).sqrt(), noise(STEPS, 4, 2, seed=1)
    model = Mixture(TRIANGLE, 0.5, path=VP)
    x = start = VP(float(sigmas[0]))[1] * noise(4, 2)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, rows(sigmas[i], x), None), t, x, eta=eta, variance_noise=drawn[i]).prev_sample
    torch.testing.assert_close(solve(model, start, sigmas, f"ddim(eta={eta})", VP, noise=Fixed(drawn)), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [STEPS, 25])
def test_dpmpp_2m(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
        use_karras_sigmas=True, final_sigmas_type="zero", lower_order_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    model, sigmas = Mixture(TRIANGLE, 0.5, path=VP), scheduler.sigmas.double()
    x = start = VP(float(sigmas[0]))[1] * noise(4, 2)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, rows(sigmas[i], x), None), t, x).prev_sample.double()
    torch.testing.assert_close(solve(model, start, sigmas, "dpmpp_2m", VP), x, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("flow_euler", "FlowMatchEulerDiscreteScheduler"), ("flow_heun", "FlowMatchHeunDiscreteScheduler")]
)
def test_flow_matching(ours, theirs, shift):
    """Their sigma is the flow time t; t = 1 is pure noise."""
    scheduler = getattr(diffusers, theirs)(shift=shift)
    scheduler.set_timesteps(STEPS)
    times = levels(scheduler)
    sigmas = times / (1 - times)
    assert sigmas[0].isinf()
    model = Mixture(TRIANGLE, 0.5, path=FLOW)
    x = start = noise(4, 2)
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[i].double()
        velocity = (x - model(x, rows(s / (1 - s), x), None)) / s
        x = scheduler.step(velocity, t, x).prev_sample.double()
    torch.testing.assert_close(solve(model, start, sigmas, ours, FLOW), x, rtol=FLOAT32, atol=FLOAT32)


def test_the_comparison_is_sharp():
    """Samplers differ from each other by far more than the tolerance."""
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    x = levels(scheduler)[0] * noise(4, 2)
    ends = [solve(MODEL, x, levels(scheduler), name, VE) for name in ("euler", "heun", "dpmpp_2m")]
    assert min((a - b).abs().max() for a, b in [ends[:2], ends[1:], ends[::2]]) > 100 * FLOAT32
