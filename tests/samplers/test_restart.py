"""Restart against its golden run, and what a restart is."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.noise import FLOW, VE, VP, edm, karras
from genkit.random import Fixed, Gaussian
from genkit.samplers import SAMPLERS
from genkit.samplers.diffusion.loop import points
from genkit.samplers.diffusion.restart import Restart, insert, restarted
from tests.gaussians import TRIANGLE, Gaussians, Mixture, solve
from tests.samplers.test_edm_reference import Data

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers" / "restart_edm.npz"


def test_golden_run():
    """43 evaluations. Their levels inside the interval are computed in float32, which is all that differs."""
    g = np.load(GOLDEN)
    count, times, low, high = json.loads(str(g["restart_info"]))["0"]
    sampler = SAMPLERS["restart"](low=low, high=high, points=count, times=times, jump_noise=float(g["S_noise"]))
    model = Data(g["data"], math.inf)
    x = 80.0 * torch.from_numpy(g["latents"])
    out = solve(model, x, edm(int(g["steps"])), sampler, noise=Fixed(torch.from_numpy(g["noise"])))
    states = np.stack([x for x, _ in model.calls])
    np.testing.assert_allclose([s for _, s in model.calls], g["call_sigma"], rtol=1e-6)
    np.testing.assert_allclose(states[:28], g["call_x"][:28], rtol=0, atol=1e-9)
    np.testing.assert_allclose(states[28:], g["call_x"][28:], rtol=0, atol=2e-7)
    np.testing.assert_allclose(out.numpy(), g["final"], rtol=0, atol=1e-9)


def sigmas(some):
    return [round(p.sigma, 6) for p in some]


def test_levels_that_are_visited():
    grid = points(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0]), VE)
    assert sigmas(insert(grid, VE, [Restart(1.1, 3.0, 2, 2)])) == [8, 4, 2, 1, 3, 1, 3, 1, 0.5, 0]
    assert sigmas(insert(grid, VE, [Restart(0.5, 1.0, 2), Restart(4.0, 8.0, 2)])) == [8, 4, 8, 4, 2, 1, 0.5, 1, 0.5, 0]
    inner = insert(grid, FLOW, [Restart(0.5, 3.0, 4)])[5:9]
    assert sigmas(inner) == [round(float(v), 6) for v in karras(4, 0.5, 3.0)[:-1]]
    assert inner[1][1:] == FLOW(inner[1].sigma)
    assert insert(grid, VE, [Restart(0.5, 3.0, 4, 0)]) == grid


@pytest.mark.parametrize("bad", [Restart(1.0, 1.0), Restart(1.1, 0.9), Restart(0.1, 3.0, 1), Restart(1.0, math.inf)])
def test_intervals_that_do_not_fit(bad):
    grid = points(torch.tensor([8.0, 1.0, 0.0]), VE)
    with pytest.raises(ValueError, match="give at least 2 points, and a finite high above 1, the grid's level nearest to low"):
        insert(grid, VE, [bad])


def test_it_chooses_its_levels_once():
    with pytest.raises(ValueError, match="chooses its levels itself; give one that follows the grid, such as 'heun'"):
        restarted("restart", [Restart(0.1, 1.0)])


@pytest.mark.parametrize(("name", "path"), [("heun", VE), ("dpmpp_2m", VP), ("flow_heun", FLOW)])
def test_several_intervals_around_any_sampler(name, path):
    """Samples keep their law, and do not depend on their batch."""
    sampler = restarted(name, [Restart(0.06, 0.3, 6, 2), Restart(1.0, 3.0, 8, 2)])
    model, seeds = Mixture(TRIANGLE, 0.4, path=path), range(600)
    x = path(40.0)[1] * Gaussian(seeds)(torch.empty(600, 2, dtype=torch.float64))
    out = solve(model, x, karras(40, 0.002, 40.0), sampler, path, noise=Gaussian(seeds, 1))
    away = torch.cdist(out, TRIANGLE.double())
    shares = torch.bincount(away.argmin(1), minlength=3) / 600
    assert (shares - 1 / 3).abs().max() < 0.075
    assert away.min(1).values.square().mean().item() == pytest.approx(2 * 0.4**2, rel=0.12)
    few = solve(model, x[:2], karras(40, 0.002, 40.0), sampler, path, noise=Gaussian(range(2), 1))
    torch.testing.assert_close(few, out[:2], rtol=1e-10, atol=1e-10)


def test_rises_add_exactly_the_missing_noise():
    """A constant estimate, Euler: the state before the last way down has the level it rose to."""
    seen = []
    seeds = range(3000)
    x = torch.zeros(3000, 1, dtype=torch.float64)
    grid = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
    solve(Gaussians([0.0], [0.0]), x, grid, restarted("euler", [Restart(2.0, 4.0, 2)]), noise=Gaussian(seeds, 1),
          callback=lambda info, result: seen.append((info.sigma, info.x.std().item())))  # fmt: skip
    assert [s for s, _ in seen] == [5.0, 4.0, 2.0]
    assert seen[1][1] == pytest.approx(math.sqrt(16 - 4), rel=0.05)
