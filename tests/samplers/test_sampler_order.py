"""The declared order of every sampler, fitted on exact probability flows. A new sampler is in this test by being registered."""

import math

import numpy as np
import pytest
import torch

from genkit.noise import FLOW, VE, VP, uniform_t
from genkit.samplers import SAMPLERS
from tests.gaussians import PATHS, TRIANGLE, Gaussians, Mixture, flow, geometric, noise_free, solve

MEAN, VARIANCE = 0.7, 0.25
# The grid is smooth and ends above 0: the step that ends at sigma = 0 is an Euler step for every sampler (n_hat and
# ln sigma do not exist there), and where a grid jumps from sigma_min to 0 that one step hides the order of the others.
START, END = 10.0, 0.1


def fitted_order(name, path, model, target, x):
    steps = (32, 64, 128)
    errors = []
    for n in steps:
        out = solve(model, x, geometric(START, END, n), noise_free(name), path)
        errors.append((out - target).abs().max().item())
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", SAMPLERS)
def test_order_on_the_gaussian_flow(name, path):
    alpha, s = path(START)
    x = alpha * MEAN + math.hypot(alpha * math.sqrt(VARIANCE), s) * torch.tensor([[-2.0], [-0.3], [1.5]], dtype=torch.float64)
    target = flow(x, MEAN, VARIANCE, path, START, END)
    order = fitted_order(name, path, Gaussians([MEAN], [VARIANCE], path), target, x)
    assert order == pytest.approx(SAMPLERS[name].order, abs=0.25)


@pytest.fixture(scope="module")
def curved():
    """A mixture, whose flow is not linear in x: denoiser, start, and the end by a fine run of the proven Heun."""
    model = Mixture(TRIANGLE, 0.5)
    x = START * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, solve(model, x, geometric(START, END, 1500), "heun")


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_on_a_curved_flow(name, curved):
    model, x, target = curved
    assert fitted_order(name, VE, model, target, x) == pytest.approx(SAMPLERS[name].order, abs=0.3)


@pytest.mark.parametrize("path", [VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_pure_noise(name, path):
    """sigma = inf is a regular starting point: the state is the noise itself, and the end is mean + std n."""
    x = torch.tensor([[-1.7], [0.2], [2.5]], dtype=torch.float64)
    model = Gaussians([MEAN], [VARIANCE], path)
    errors = [
        (solve(model, x, uniform_t(n, 0.0, math.inf), noise_free(name), path) - (MEAN + VARIANCE**0.5 * x)).abs().max()
        for n in (32, 128)
    ]
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3


def test_pure_noise_on_the_ve_path_is_refused():
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="sigma=inf has no place on the 've' path"):
        solve(Gaussians(), x, uniform_t(4, 0.0, math.inf), "euler", VE)


def test_declared_orders():
    """The table says what the papers say; a change of either shows here."""
    orders = {"euler": 1, "ddim": 1, "euler_ancestral": 1, "flow_euler": 1, "heun": 2, "flow_heun": 2, "dpmpp_2m": 2}
    assert {name: SAMPLERS[name].order for name in orders} == orders
