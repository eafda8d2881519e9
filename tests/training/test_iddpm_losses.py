"""Hybrid loss and importance sampling against improved-diffusion."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.samplers.diffusion.likelihood import vlb_term
from genkit.samplers.diffusion.process import Process, cosine_betas
from genkit.training.iddpm import ImportanceSampler, hybrid_loss, vlb_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"
UNDERFLOW = 6.7427  # sample 0 in float64; float32 CDFs underflow to the clamp in one pixel there


@pytest.fixture(scope="module")
def g():
    with np.load(GOLDEN / "iddpm_losses.npz") as file:
        return {key: torch.from_numpy(file[key]).double() for key in file.files if file[key].dtype.kind == "f"} | {
            "t": torch.from_numpy(file["t"]),
            "process": Process(cosine_betas(int(file["T"]))),
        }


def near(found, expected, underflow=None):
    expected = expected.clone()
    if underflow is not None:
        expected[0] = underflow
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def near_gradient(found, expected):
    """All values but those of the pixel that underflows."""
    off = (found - expected).abs() > 2e-4 * expected.abs() + 2e-5
    assert off[1:].sum() == 0
    assert off[0].sum() <= 2
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "weight"), [("RESCALED_MSE", None), ("MSE", 1.0)])
def test_hybrid_loss(g, kind, weight):
    output = g["model_output"].clone().requires_grad_()
    found = hybrid_loss(g["process"], output, g["x_start"], g["x_t"], g["t"], g["noise"], weight)
    near(found.mse, g[f"{kind}_LEARNED_RANGE_mse"])
    scale = 1.0 if weight else 0.02
    near(found.vlb * scale, g[f"{kind}_LEARNED_RANGE_vb"], UNDERFLOW * scale)
    near(found.loss, g[f"{kind}_LEARNED_RANGE_loss"], float(found.mse[0]) + UNDERFLOW * scale)
    near_gradient(torch.autograd.grad(found.loss.sum(), output)[0], g[f"{kind}_LEARNED_RANGE_grad"])


@pytest.mark.parametrize(("kind", "times"), [("KL", 1), ("RESCALED_KL", 20)])
@pytest.mark.parametrize(("variance", "fraction"), [("FIXED_SMALL", 0.0), ("FIXED_LARGE", 1.0), ("LEARNED_RANGE", None)])
def test_bound_as_a_loss(g, variance, fraction, kind, times):
    output = (g["model_output"] if fraction is None else g["model_output"][:, :3]).clone().requires_grad_()
    found = times * vlb_loss(g["process"], output, g["x_start"], g["x_t"], g["t"], fraction)
    expected = g[f"{kind}_{variance}_loss"]
    near(found[1:], expected[1:])
    assert found[0].item() <= expected[0].item() * 1.0001  # at most the underflow
    grad = torch.autograd.grad(found.sum(), output)[0]
    off = (grad - g[f"{kind}_{variance}_grad"]).abs() > 5e-4 * g[f"{kind}_{variance}_grad"].abs() + 5e-4
    assert off[1:].sum() == 0
    assert off[0].sum() <= 4


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE"])
@pytest.mark.parametrize("kind", ["MSE", "RESCALED_MSE"])
def test_fixed_variances_have_no_bound_in_the_loss(g, kind, variance):
    eps = g["model_output"][:, :3].clone().requires_grad_()
    output = torch.cat([eps, torch.zeros_like(eps)], 1)
    found = hybrid_loss(g["process"], output, g["x_start"], g["x_t"], g["t"], g["noise"], weight=0.0)
    near(found.loss, g[f"{kind}_{variance}_loss"])
    torch.testing.assert_close(torch.autograd.grad(found.loss.sum(), eps)[0], g[f"{kind}_{variance}_grad"], rtol=1e-4, atol=1e-6)


def test_clipped_bound(g):
    process, x, t = g["process"], g["x_t"], g["t"]
    eps, v = g["model_output"].chunk(2, dim=1)
    for clip in (0, 1):
        x0 = process.denoised(x, eps, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        term = vlb_term(process, g["x_start"], x, t, process.posterior_mean(x0, x, t), process.log_variance(t, x, (v + 1) / 2))
        near(term[1:], g[f"vb_terms_bpd_clip{clip}"][1:])
        assert term[0] <= g[f"vb_terms_bpd_clip{clip}"][0] + 1e-4


def test_the_mean_gets_no_gradient_from_the_bound(g):
    output = g["model_output"].clone().requires_grad_()
    found = hybrid_loss(g["process"], output, g["x_start"], g["x_t"], g["t"], g["noise"])
    grad = torch.autograd.grad(found.vlb.sum(), output)[0]
    assert grad[:, :3].abs().max() == 0
    assert grad[:, 3:].abs().max() > 0


def test_importance_weights():
    with np.load(GOLDEN / "iddpm_importance.npz") as file:
        total, times, losses = int(file["T"]), torch.from_numpy(file["ts"]), torch.from_numpy(file["losses"])
        sampler = ImportanceSampler(total, int(file["history_per_term"]), float(file["uniform_prob"]))
        sampler.update(times[:total], losses[:total])
        np.testing.assert_allclose(sampler.weights, file["weights_cold"])
        sampler.update(times[total:], losses[total:])
        np.testing.assert_allclose(sampler.weights, file["weights_warm"], rtol=1e-9)
        assert sampler.weights.std() > 0


def test_importance_sampling_is_unbiased():
    """The weighted mean over drawn timesteps is the plain mean over all, and rare large losses are drawn more often."""
    loss = torch.tensor([8.0, 1.0, 1.0, 2.0])
    sampler = ImportanceSampler(4, 2)
    for _ in range(2):
        sampler.update(torch.arange(4), loss)
    t, weight = sampler.sample(20_000, torch.Generator().manual_seed(0))
    assert (weight * loss[t]).mean().item() == pytest.approx(3.0, rel=0.02)
    assert (t == 0).float().mean().item() == pytest.approx(8 / 12, abs=0.02)
    assert (weight * loss[t]).std() < 0.1
