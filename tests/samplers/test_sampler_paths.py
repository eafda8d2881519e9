"""Every sampler on every path reaches the same images, and samples have the right law."""

import itertools
import math

import pytest
import torch

from genkit.noise import FLOW, VE, VP, karras, uniform_t
from genkit.random import Fixed, Gaussian
from genkit.samplers import SAMPLERS
from tests.gaussians import NOISE_OPTIONS, PATHS, TRIANGLE, Gaussians, Mixture, geometric, noise_free, solve

WEIGHTS = torch.tensor([0.5, 0.2, 0.3])


def start_on(path, noise, sigma):
    return path(sigma)[1] * noise


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def limit():
    """Where the flow takes 16 starting points, by 1500 second-order steps of equal length in ln sigma."""
    grid = torch.cat([geometric(40.0, 1e-4, 1500), torch.zeros(1)])
    return solve(Mixture(TRIANGLE, 0.5, WEIGHTS), 40 * noise(16, 2), grid, "heun")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_on_every_path_has_the_same_limit(name, path, limit):
    grid = karras(400, 0.002, 40.0)
    x = solve(Mixture(TRIANGLE, 0.5, WEIGHTS, path), start_on(path, noise(16, 2), 40.0), grid, noise_free(name), path)
    assert (x - limit).abs().max() < (0.05 if SAMPLERS[name].order == 1 else 2e-3)


@pytest.mark.parametrize("path", [VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["euler", "ddim", "ddim(eta=0.5)", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "pcg"])
def test_steps_that_freeze_the_estimate_are_the_same_on_every_path(name, path):
    """alpha' D + s' n_hat is a rescaled ve step, so eight coarse steps already agree to rounding."""
    grid, n = karras(8, 0.01, 20.0), Fixed(noise(8, 3, 2, seed=1))
    ends = [solve(Mixture(TRIANGLE, 0.5), start_on(p, noise(3, 2), 20.0), grid, name, p, noise=n) for p in (VE, path)]
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model_path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_the_path_of_the_network_does_not_matter(path, model_path):
    """A sampler may integrate in other coordinates than those of the network it calls."""
    grid, x = karras(6, 0.01, 20.0), start_on(path, noise(3, 2), 20.0)
    own = solve(Mixture(TRIANGLE, 0.5, path=path), x, grid, "heun", path)
    torch.testing.assert_close(solve(Mixture(TRIANGLE, 0.5, path=model_path), x, grid, "heun", path), own, rtol=1e-11, atol=1e-11)


def test_flow_euler_is_euler_in_time():
    """x + (t' - t) v with v = (x - D) / t, as flow-matching models are sampled."""
    model, x = Mixture(TRIANGLE, 0.5, path=FLOW), noise(5, 2)
    expected = x.clone()
    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    for t, t_next in itertools.pairwise(times):
        sigma = (t / (1 - t)).expand(5)
        expected = expected + (t_next - t) * (expected - model(expected, sigma, None)) / t
    torch.testing.assert_close(solve(model, x, uniform_t(6, 0.0, math.inf), "flow_euler", FLOW), expected, rtol=1e-11, atol=1e-11)


# ---- the law of the samples ----


def sliced_wasserstein(a, b, directions=32):
    """Mean over fixed directions of the 2-Wasserstein distance of the projections."""
    angle = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    d = torch.stack([angle.cos(), angle.sin()])
    return ((a @ d).sort(0).values - (b @ d).sort(0).values).square().mean(0).sqrt().mean().item()


class Stream:
    """Noise from one generator: the law of thousands of samples without thousands of generators."""

    def __init__(self, scale=1.0):
        self.generator, self.scale = torch.Generator().manual_seed(5), scale

    def __call__(self, like, step):
        return self.scale * torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def spread(out, means):
    """Share of each mode, and the mean standard deviation inside the modes."""
    nearest = torch.cdist(out, means).argmin(1)
    inside = torch.stack([out[nearest == k].std(0).mean() for k in range(len(means))])
    return torch.bincount(nearest, minlength=len(means)) / len(out), inside.mean().item()


def loud(name):
    """Every version of a sampler worth sampling with: as registered, and with each of its noises on."""
    sampler = SAMPLERS[name]
    strength = {"eta": 1.0, "churn": 30.0, "corrections": 3, "times": 4}
    versions = [sampler, *(sampler(**{key: strength[key]}) for key in NOISE_OPTIONS if key in sampler.options)]
    return {str(v): v for v in versions}.values()


COUNT, STEPS = 2000, 120


@pytest.mark.parametrize("sampler", [s for name in SAMPLERS for s in loud(name)], ids=str)
def test_samples_follow_the_mixture(sampler):
    path = sampler.path or VE
    model = Mixture(TRIANGLE, 0.4, WEIGHTS, path)
    x = start_on(path, noise(COUNT, 2, seed=3), 40.0)
    out = solve(model, x, karras(STEPS, 0.002, 40.0), sampler, path, noise=Stream())
    truth, again = (model.draw(COUNT, seed) for seed in (1, 2))
    assert sliced_wasserstein(out, truth) < sliced_wasserstein(truth, again) + 0.06
    shares, inside = spread(out, model.means)
    torch.testing.assert_close(shares, WEIGHTS, rtol=0, atol=0.045)  # four standard errors
    assert inside == pytest.approx(0.4, abs=0.02)


def test_the_check_above_sees_noise_that_is_too_strong():
    model = Mixture(TRIANGLE, 0.4, WEIGHTS)
    x = start_on(VE, noise(COUNT, 2, seed=3), 40.0)
    out = solve(model, x, karras(STEPS, 0.002, 40.0), "euler_ancestral", noise=Stream(1.15))
    assert spread(out, model.means)[1] > 0.42


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_mass_is_hit_exactly(name):
    """D constant: every sampler ends on it whatever the steps, on every path."""
    for path in PATHS:
        x = start_on(path, noise(4, 1), 20.0)
        out = solve(Gaussians([1.3], [0.0], path), x, karras(5, 0.01, 20.0), name, path, noise=Gaussian(range(4), stream=1))
        torch.testing.assert_close(out, torch.full_like(out, 1.3), rtol=0, atol=1e-12)
