"""PFGM++ is Student-t noise: posterior means, loss, prior and samples against its golden vectors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from genkit.noise import karras
from genkit.random import Gaussian, StudentT
from genkit.training.cifar10_diffusion import edm_loss
from tests.gaussians import solve
from tests.samplers.test_edm_reference import Data

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"


def golden(name):
    with np.load(GOLDEN / f"pfgmpp_{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("degrees", [8, 128])
def test_posterior_mean(degrees):
    """Softmax of -(N + D) / 2 ln(|x - y|^2 + sigma^2 D)."""
    g = golden("posterior_mean")
    x, sigma = (torch.from_numpy(g[f"D{degrees}_{key}"]).double() for key in ("x", "sigma"))
    found = Data(g["data"], degrees)(x, sigma, None).flatten(1)
    np.testing.assert_allclose(found.numpy(), g[f"D{degrees}_target"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degrees", [8, 128])
def test_the_loss_takes_any_noise(degrees):
    """EDM's weighted loss with another noise is theirs."""
    g = {key: torch.from_numpy(value) for key, value in golden("loss").items()}
    y, noisy, sigma, loss = (g[f"D{degrees}_{key}"] for key in ("y", "noisy", "sigma", "loss"))
    s = sigma.reshape(-1, 1, 1, 1)
    seen = []

    class Shrink(torch.nn.Module):
        def forward(self, x, sigma, condition):
            seen.append(x)
            return x * 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)

    found = edm_loss(Shrink(), y, torch.zeros(len(y)), sigma, (noisy - y) / s, 0.5)
    torch.testing.assert_close(seen[0], noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, loss.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degrees", [32, 128, 2048])
def test_the_prior_has_their_law(degrees):
    """|x|^2 / (N sigma_max^2) is F(N, D) distributed, for their draws and for ours; directions are uniform."""
    g = golden("prior")
    n, top = int(g["N"]), float(g["sigma_max"])
    theirs = g[f"latents_D{degrees}"].reshape(16, -1)
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), g[f"radius_D{degrees}"], rtol=1e-5)
    ours = top * StudentT(range(3000), degrees)(torch.empty(3000, n, dtype=torch.float64)).numpy()
    for draws in (theirs, ours):
        assert stats.kstest((draws**2).sum(1) / (n * top**2), stats.f(n, degrees).cdf).pvalue > 0.01
        direction = draws / np.linalg.norm(draws, axis=1, keepdims=True)
        assert np.abs(direction.mean(0)).max() < 4 / math.sqrt(n * len(draws))
    wrong = stats.kstest((ours**2).sum(1) / (n * top**2), stats.f(n, degrees / 8).cdf).pvalue
    assert wrong < 1e-3 or degrees == 2048  # nearly Gaussian: 8 times fewer degrees hardly show


@pytest.mark.parametrize("degrees", [1, 2, 8])
def test_the_right_prior_gives_the_right_samples(degrees):
    """Normal quantiles as data, the exact denoiser, Heun: Student-t starts end at unit width, Gaussian ones are too narrow."""
    data = stats.norm.ppf((np.arange(200) + 0.5) / 200).reshape(200, 1, 1, 1)
    seeds = range(2000)
    like = torch.empty(2000, 1, 1, 1, dtype=torch.float64)

    def width(noise):
        return solve(Data(data, degrees), 80 * noise(like), karras(20), "heun").std().item()

    assert width(StudentT(seeds, degrees)) == pytest.approx(1.0, abs=0.06)
    assert width(Gaussian(seeds)) < 0.93
