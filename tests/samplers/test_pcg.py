"""Predictor-corrector guidance: the closed forms of Gaussians, and what one step is."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.denoiser import Guided
from genkit.guidance import CFG, NoGuidance, parse
from genkit.guidance.predictor_corrector import PredictorCorrector
from genkit.noise import FLOW, VE, VP, karras
from genkit.random import Fixed, Gaussian
from genkit.samplers import SAMPLERS, sample
from tests.gaussians import TRIANGLE, Gaussians, Mixture, geometric, solve

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers" / "cfg_gaussian1d.npz")
VC, VU = float(GOLDEN["var_cond"]), float(GOLDEN["var_uncond"])
TOP, BOTTOM = 300.0, 3e-3
CONDITIONS = {"cond": torch.zeros(2, dtype=torch.long), "uncond": torch.ones(2, dtype=torch.long)}


def variance(guidance, steps, corrections):
    """The exact variance at the end of a run from N(0, TOP^2): one row for the start, and one for each draw of noise."""
    grid, model = geometric(TOP, BOTTOM, steps), Gaussians([0, 0], [VC, VU])
    rows = steps * corrections + 1
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[0] = 1.0
    draws = iter(range(1, rows))

    def basis(like, step):
        out = torch.zeros_like(like)
        out[next(draws)] = 1
        return out

    conditions = {"cond": torch.zeros(rows, dtype=torch.long), "uncond": torch.ones(rows, dtype=torch.long)}
    out = solve(model, x, grid, SAMPLERS["pcg"](corrections=corrections), VE, guidance, conditions, basis).flatten()
    return (TOP**2 * out[0] ** 2 + out[1:].square().sum()).item()


@pytest.mark.parametrize("i", range(5))
def test_one_correction_with_2w_minus_1_is_ddpm_with_w(i):
    """Bradley & Nakkiran 2024: at w = 2 both end at 0.583, where DDIM ends at 0.5 and the powered law is 0.667."""
    w = float(GOLDEN["gamma"][i])
    found = variance(PredictorCorrector(CFG(2 * w - 1)), 600, 1)
    assert found == pytest.approx(float(GOLDEN["var_cfg_ddpm"][i]), rel=0.03)
    assert found == pytest.approx(float(GOLDEN["sim_pcg_ddim_2g_minus_1_40000"][i]), rel=0.03)
    if w > 1:
        assert abs(found - float(GOLDEN["var_cfg_ddim"][i])) > 0.04 * found


def test_many_corrections_sample_the_powered_law():
    i = list(GOLDEN["gamma"]).index(2.0)
    found, powered = variance(PredictorCorrector(CFG(2.0)), 120, 12), float(GOLDEN["var_gamma_powered"][i])
    assert found == pytest.approx(powered, rel=0.05)  # 4 % of it the length of a Langevin step
    assert found > 1.08 * float(GOLDEN["var_cfg_ddpm"][i])


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_a_correction_with_the_same_estimate_makes_a_ddpm_step(path):
    """With a constant estimate the run is the ancestral one, draw for draw."""
    grid, noise = karras(6, 0.05, 20.0), torch.randn(6, 2, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = path(20.0)[1] * torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    model = Gaussians([0.7], [0.0], path)
    pcg, ddpm = (solve(model, x, grid[:-1], name, path, noise=Fixed(noise)) for name in ("pcg", "euler_ancestral"))
    torch.testing.assert_close(pcg, ddpm, rtol=1e-12, atol=1e-12)


def test_a_short_correction_is_a_langevin_step():
    """x + delta / 2 score + sqrt(delta) z, with delta = sigma^2 - sigma'^2 and the score of the new level."""
    model, sigma, shrink = Mixture(TRIANGLE, 0.5), 1.0, 1e-4
    there = sigma * (1 - shrink)
    x = torch.tensor([[0.4, -0.8], [1.5, 1.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=torch.float64)
    grid = torch.tensor([sigma, there], dtype=torch.float64)
    found = solve(model, x, grid, "pcg", noise=Fixed(z[None]))
    after = solve(model, x, grid, "ddim")
    delta = sigma**2 - there**2
    score = (model(after, torch.full((2,), there, dtype=torch.float64), None) - after) / there**2
    langevin = after + delta / 2 * score + math.sqrt(delta) * z
    assert (found - langevin).abs().max() < 5 * delta**1.5
    assert (found - after).abs().min() > 0.1 * math.sqrt(delta)


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_evaluations_and_branches(corrections):
    """Conditional steps of one row, guided corrections of two; none at the end."""
    guided = Guided(Gaussians([0, 0], [VC, VU]), PredictorCorrector(CFG(3.0)), CONDITIONS, 2)
    x = torch.ones(2, 1, dtype=torch.float64)
    sample(guided, x, karras(5, 0.05, 3.0), SAMPLERS["pcg"](corrections=corrections), VE, Gaussian([0, 1], 1))
    rows = guided.trace.rows
    assert guided.ledger.nfe == [5 + 2 * corrections * 4] * 2
    assert [r["branches"] for r in rows if r["stage"] == "step"] == ["cond"] * 5
    assert {r["branches"] for r in rows if r["stage"] == "corrector"} <= {"cond+uncond"}
    assert [r["weight"] for r in rows if r["stage"] == "corrector"] == [3.0] * 4 * corrections


def test_large_steps_stay_stable():
    """Two steps over four orders of magnitude: the corrected state has the level asked for."""
    seeds = range(2000)
    x = 100 * Gaussian(seeds)(torch.empty(2000, 1, dtype=torch.float64))
    out = solve(Gaussians([0.0], [0.0]), x, torch.tensor([100.0, 1.0, 0.1]), "pcg(corrections=4)", noise=Gaussian(seeds, 1))
    assert out.std().item() == pytest.approx(0.1, rel=0.06)


def test_it_needs_a_corrector():
    made = parse("PredictorCorrector(CFG(3.0))")
    assert made == PredictorCorrector(CFG(3.0))
    with pytest.raises(ValueError, match=r"sampler='heun' has no corrector, which .* needs; use one of pcg"):
        SAMPLERS["heun"].check(made)
    SAMPLERS["pcg"].check(made)
    SAMPLERS["pcg"].check(NoGuidance())
