"""Heun against the EDM sampler: golden trajectories of its code base, and its algorithm 2 written out with churn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.guidance.base import Result, StepInfo
from genkit.noise import VE, edm, karras
from genkit.random import Fixed
from genkit.samplers import sample
from tests.gaussians import TRIANGLE, Mixture, solve

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers" / "pfgmpp_heun.npz"


class Data:
    """The posterior mean over a finite data set under Gaussian (D = inf) or PFGM++ noise."""

    path = VE

    def __init__(self, data, degrees):
        self.data, self.degrees, self.calls = torch.from_numpy(data).double(), degrees, []

    def __call__(self, x, sigma, condition):
        self.calls.append((x, sigma[0].item()))
        square = (x[:, None] - self.data).flatten(2).square().sum(-1)
        n, d, s2 = self.data[0].numel(), self.degrees, sigma[:, None].square()
        logits = -square / (2 * s2) if math.isinf(d) else -(n + d) / 2 * (square + s2 * d).log()
        return torch.einsum("bm,mchw->bchw", logits.softmax(1), self.data)


@pytest.mark.parametrize("degrees", [8, 128, math.inf])
def test_golden_trajectories(degrees):
    golden, key = np.load(GOLDEN), f"D{degrees}"
    model, states = Data(golden["data"], degrees), []
    x = torch.from_numpy(golden[f"{key}_latents"]).double() * (80.0 if math.isinf(degrees) else 1.0)
    out = solve(model, x, edm(18), "heun", callback=lambda info, result: states.append(info.x))
    trajectory = torch.stack([*states[1:], out])
    np.testing.assert_allclose(trajectory.numpy(), golden[f"{key}_traj"], rtol=0, atol=1e-9)
    np.testing.assert_allclose([s for _, s in model.calls], golden[f"{key}_call_sigma"], rtol=1e-12)
    np.testing.assert_allclose(np.stack([x for x, _ in model.calls]), golden[f"{key}_call_x"], rtol=0, atol=1e-9)


def algorithm_2(model, x, t, z, churn, low, high, s_noise):
    """Karras et al. 2022, algorithm 2, with sigma(t) = t and s(t) = 1."""
    n = len(t) - 1

    def levels(value):
        return torch.full((len(x),), value, dtype=torch.float64)

    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t[i] <= high else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * z[i]
        d = (x_hat - model(x_hat, levels(t_hat), None)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - model(x, levels(t[i + 1]), None)) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    return x


@pytest.mark.parametrize(
    "churn", [(0, 0, math.inf, 1.0), (40, 0.05, 50, 1.003), (5, 0, math.inf, 0.9), (1e6, 0, math.inf, 1.0)], ids=str
)
def test_churn_is_algorithm_2(churn):
    g = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(4, 2, generator=g, dtype=torch.float64)
    z, grid = torch.randn(12, 4, 2, generator=g, dtype=torch.float64), edm(12)
    model = Mixture(TRIANGLE, 0.5)
    with torch.inference_mode():
        expected = algorithm_2(model, x, [float(v) for v in grid], z, *churn)
    sampler = "heun(churn={}, churn_min={}, churn_max={}, churn_noise={})".format(*churn)
    torch.testing.assert_close(solve(model, x, grid, sampler, noise=Fixed(z)), expected, rtol=1e-10, atol=1e-10)


def test_gates_see_the_level_where_the_step_began():
    """Both evaluations of a churned step report the grid's level, and coordinates of the raised one."""
    seen: list[StepInfo] = []
    model = Mixture(TRIANGLE, 0.5)

    def denoise(info):
        seen.append(info)
        return Result(model(info.x, torch.full((2,), info.s / info.alpha, dtype=torch.float64), None))

    grid = karras(3, 0.1, 10.0)
    sample(denoise, torch.ones(2, 2, dtype=torch.float64), grid, "heun(churn=1.5)", VE, Fixed(torch.zeros(3, 2, 2)))
    levels = [float(v) for v in grid]
    assert [(i.index, i.stage, i.sigma, i.sigma_next) for i in seen] == [
        (0, "step", levels[0], levels[1]), (0, "second", levels[0], levels[1]),
        (1, "step", levels[1], levels[2]), (1, "second", levels[1], levels[2]),
        (2, "step", levels[2], 0.0),
    ]  # fmt: skip
    assert seen[0].s == pytest.approx(levels[0] * math.sqrt(2))
    assert [i.progress for i in seen] == [0, 0, 0.5, 0.5, 1]
