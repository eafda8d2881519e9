"""Noise in samplers: it belongs to the sample, is drawn only where its scale is above 0, and comes from the given source."""

import math

import pytest
import torch

from genkit.guidance import CFG
from genkit.noise import FLOW, VE, edm, uniform_t
from genkit.random import Gaussian
from genkit.samplers import SAMPLERS
from tests.gaussians import NOISE_OPTIONS, TRIANGLE, Gaussians, Mixture, noise_free, solve

STRENGTH = {"eta": 1.0, "churn": 20.0, "corrections": 1, "times": 1}
STOCHASTIC = [(name, key) for name, s in SAMPLERS.items() for key in NOISE_OPTIONS if key in s.options]
GRID = edm(6)


class Counting:
    """Gaussian noise that remembers the steps it was asked for."""

    def __init__(self, seeds):
        self.inner, self.steps = Gaussian(seeds, stream=1), []

    def __call__(self, like, step):
        self.steps.append(step)
        return self.inner(like, step)


def versions():
    return [SAMPLERS[n] for n in SAMPLERS] + [SAMPLERS[n](**{key: STRENGTH[key]}) for n, key in STOCHASTIC]


@pytest.mark.parametrize("sampler", versions(), ids=str)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    seeds, path = [4, 0, 9, 2, 7], sampler.path or VE
    model = Mixture(TRIANGLE, 0.5, path=path)

    def run(some):
        x = path(80.0)[1] * Gaussian(some)(torch.empty(len(some), 2, dtype=torch.float64))
        return solve(model, x, GRID, sampler, path, noise=Gaussian(some, stream=1))

    whole = run(seeds)
    torch.testing.assert_close(run(seeds[::-1]).flip(0), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([run(seeds[:2]), run(seeds[2:])]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([run([s]) for s in seeds]), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(run(seeds), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_noise_is_drawn_where_its_scale_is_zero(name):
    """noise_free runs with a source that is not asked, and without a source."""
    x, source = torch.ones(2, 1, dtype=torch.float64), Counting([0, 1])
    path = SAMPLERS[name].path or VE
    before = torch.get_rng_state()
    out = solve(Gaussians(path=path), x, GRID, noise_free(name), path, noise=source)
    assert source.steps == []
    assert torch.equal(out, solve(Gaussians(path=path), x, GRID, noise_free(name), path))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "key"), STOCHASTIC)
def test_noise_is_drawn_once_in_every_step_that_adds_some(name, key):
    x, source = torch.ones(2, 1, dtype=torch.float64), Counting([0, 1])
    before = torch.get_rng_state()
    solve(Gaussians(), x, GRID, SAMPLERS[name](**{key: STRENGTH[key]}), noise=source)
    # A step to sigma = 0 adds nothing; churn acts before the step and so in the last one too; restarts only where they rise.
    expected = {"churn": list(range(6)), "times": [4]}
    assert source.steps == expected.get(key, list(range(5)))
    assert torch.equal(torch.get_rng_state(), before)


def test_churn_acts_inside_its_interval_only():
    source = Counting([0])
    inside = [i for i, sigma in enumerate(GRID[:-1].tolist()) if 0.1 <= sigma <= 20]
    solve(Gaussians(), torch.ones(1, 1, dtype=torch.float64), GRID, "heun(churn=40, churn_min=0.1, churn_max=20)", noise=source)
    assert source.steps == inside
    assert 0 < len(inside) < 6


@pytest.mark.parametrize(("name", "key"), STOCHASTIC)
def test_a_missing_noise_source_is_named(name, key):
    with pytest.raises(ValueError, match=r"noise=None, but this sampler draws noise: give .*Gaussian"):
        solve(Gaussians(), torch.ones(1, 1, dtype=torch.float64), GRID, SAMPLERS[name](**{key: STRENGTH[key]}))


@pytest.mark.parametrize("name", [n for n, key in STOCHASTIC if key == "churn"])
def test_pure_noise_cannot_be_made_noisier(name):
    """Churn at sigma = inf would be 0 / 0: the first step is left alone."""
    x, source = torch.tensor([[0.5], [-1.0]], dtype=torch.float64), Counting([0, 1])
    out = solve(Gaussians([0.3], [0.2], FLOW), x, uniform_t(6, 0.0, math.inf), SAMPLERS[name](churn=2.0), FLOW, noise=source)
    assert source.steps == [1, 2, 3, 4, 5]
    assert out.isfinite().all()


@pytest.mark.parametrize("name", [n for n, key in STOCHASTIC if key == "eta"])
@pytest.mark.parametrize("eta", [3.0, math.inf])
def test_more_than_all_the_noise_is_all_the_noise(name, eta):
    """At large eta the state is D plus fresh noise of the level asked for, never of a higher one."""
    source = Gaussian(range(3000), stream=1)
    x = 5 * torch.randn(3000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = solve(Gaussians(variances=[0.0]), x, torch.tensor([5.0, 2.0]), SAMPLERS[name](eta=eta), noise=source)
    assert out.std().item() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("sampler", versions(), ids=str)
def test_gradients_flow_through_a_run(sampler):
    """Through the start, the network and the guidance; nothing in the loop detaches."""
    path, grid = sampler.path or VE, torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    shift = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.8, -1.1], [2.0, 0.3]], dtype=torch.float64, requires_grad=True)

    class Shifted(Mixture):
        def __call__(self, x, sigma, condition):
            return super().__call__(x, sigma, condition) + shift * condition[:, None]

    def run(x, s):
        nonlocal shift
        shift = s
        conditions = {"cond": torch.ones(2), "uncond": torch.zeros(2)}
        return solve(Shifted(TRIANGLE, 0.5, path=path), x, grid, sampler, path, CFG(2.0), conditions, Gaussian([0, 1]))

    assert torch.autograd.gradcheck(run, (x, shift))
    grads = torch.autograd.grad(run(x, shift).sum(), (x, shift))
    assert all(g.abs().min() > 1e-6 for g in grads)
