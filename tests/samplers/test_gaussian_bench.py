"""Guidance and sampler together on Gaussians, where their law is known: p(x|c) = N(0, 1), p(x) = N(0, 2).

A deterministic sampler with CFG ends at variance v_c^w v_u^(1-w), a DDPM sampler at another value and the gamma-powered
density is a third, so a wrong scale convention, guidance applied twice or noise at the wrong scale shows. Nothing is
drawn at random: every sampler is linear in its start and its noise here, so the weights of both give the exact variance.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from genkit.guidance import APG, CFG, Interval, NoGuidance, Scheduled, parse
from genkit.guidance.cfgpp import CFGPP
from genkit.guidance.predictor_corrector import PredictorCorrector
from genkit.noise import VE
from genkit.samplers import SAMPLERS
from tests.gaussians import Gaussians, geometric, noise_free, solve

VC, VU = 1.0, 2.0
TOP, BOTTOM = 500.0, 1e-3
STEPS = 600
LENGTH = math.log(TOP / BOTTOM)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers" / "cfg_gaussian1d.npz")


def variance(guidance, sampler, stochastic=False):
    """Variance at the end of a run that starts at N(0, TOP^2).

    Row 0 starts at 1 without noise; row k + 1 starts at 0 and meets unit noise at step k alone.
    """
    rows = STEPS + 1 if stochastic else 1
    path = sampler.path or VE
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[0] = path(TOP)[0]

    def basis(like, step):
        out = torch.zeros_like(like)
        out[step + 1] = 1
        return out

    conditions = {"cond": torch.zeros(rows, dtype=torch.long), "uncond": torch.ones(rows, dtype=torch.long)}
    main, weak = Gaussians([0, 0], [VC, VU], path), Gaussians([0], [VU], path)  # the weak model sees no class
    model = {"main": main, "weak": weak}
    noise = basis if stochastic else None
    out = solve(model, x, geometric(TOP, BOTTOM, STEPS), sampler, path, guidance, conditions, noise).flatten() / path(BOTTOM)[0]
    return (TOP**2 * out[0] ** 2 + out[1:].square().sum()).item()


def expected(weight, strength=0.0):
    """The variance equation of the guided process, solved numerically.

    dV/dln(sigma) = 2 (1 + k) sigma^2 g V - 2 k sigma^2 with g = w / (v_c + sigma^2) + (1 - w) / (v_u + sigma^2); k = 0 is the
    probability flow, k = 1 the reverse diffusion. Noise in between adds k times the Langevin terms.
    """

    def slope(u, v):
        s2 = math.exp(2 * u)
        w = weight(math.exp(u))
        g = w / (VC + s2) + (1 - w) / (VU + s2)
        return 2 * (1 + strength) * s2 * g * v - 2 * strength * s2

    span = (math.log(TOP), math.log(BOTTOM))
    return solve_ivp(slope, span, [TOP**2], rtol=1e-7, atol=1e-10, max_step=0.1).y[0, -1]


def progress(sigma):
    return math.log(TOP / sigma) / LENGTH


# Guidance and, written out by hand, the weight it has at a noise level.
RULES = {
    "none": (NoGuidance(), lambda s: 1.0),
    "CFG(0.5)": (CFG(0.5), lambda s: 0.5),
    "CFG(2)": (CFG(2.0), lambda s: 2.0),
    "CFG(5)": (CFG(5.0), lambda s: 5.0),
    "Interval": (Interval(CFG(3.0), 0.3, 5.0), lambda s: 3.0 if 0.3 < s <= 5.0 else 1.0),
    "linear": (Scheduled(CFG(2.5), "linear"), lambda s: 1 + 1.5 * 2 * progress(s)),
    "sine": (Scheduled(CFG(2.5), "sine"), lambda s: 1 + 1.5 * (1 + math.cos(math.pi * progress(s)))),
    "Interval(Scheduled)": (
        Interval(Scheduled(CFG(2.5), "inverse_linear"), 0.3, 5.0),
        lambda s: 1 + 1.5 * 2 * (1 - progress(s)) if 0.3 < s <= 5.0 else 1.0,
    ),
    "APG without its terms": (APG(2.0, eta=1.0), lambda s: 2.0),
}


# Other ways to the same weight: these run with one sampler of each kind, to keep the bench fast.
MORE = {
    "Autoguidance(2.0)": lambda s: 2.0,
    "Sum(CFG(2.0), CFG(3.0))": lambda s: 4.0,
    "Sum(CFG(2.0), Interval(CFG(3.0), 0.3, 5.0))": lambda s: 4.0 if 0.3 < s <= 5.0 else 2.0,
    "Piecewise((CFG(4.0), NoGuidance(), CFG(0.5)), (5.0, 0.3))": lambda s: 4.0 if s > 5.0 else 1.0 if s > 0.3 else 0.5,
    "LinearAG(2.0, every=1, until=1.0)": lambda s: 2.0,
    "ReuseDelta(2.0, every=1)": lambda s: 2.0,
}


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("text", MORE)
def test_other_rules_follow_the_guided_flow(name, text):
    assert variance(parse(text), noise_free(name)) == pytest.approx(
        expected(MORE[text]), rel=0.04 if SAMPLERS[name].order == 1 else 0.015
    )


@pytest.mark.parametrize(("strength", "form"), [(0.6, "schedule"), (0.6, "renoise"), (0.2, "renoise")])
def test_cfgpp(strength, form):
    """One step: ``x' = D_u + lambda (D_c - D_u) + sigma' / sigma (x - D_u)``, a product over the grid in closed form."""
    grid, gain = geometric(TOP, BOTTOM, STEPS).tolist(), TOP
    for here, there in itertools.pairwise(grid):
        cond, uncond = (v / (v + here**2) for v in (VC, VU))
        gain *= uncond + strength * (cond - uncond) + there / here * (1 - uncond)
    assert variance(CFGPP(strength, form), SAMPLERS["euler"]) == pytest.approx(gain**2, rel=1e-6)


def test_predictor_corrector():
    """CFG(2 w - 1) in one correction is CFG(w) on a DDPM sampler (Bradley & Nakkiran 2024)."""
    found = variance(PredictorCorrector(CFG(3.0)), SAMPLERS["pcg"], stochastic=True)
    assert found == pytest.approx(expected(lambda s: 2.0, 1.0), rel=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("rule", RULES)
def test_without_noise_every_sampler_follows_the_guided_flow(name, rule):
    guidance, weight = RULES[rule]
    assert variance(guidance, noise_free(name)) == pytest.approx(
        expected(weight), rel=0.04 if SAMPLERS[name].order == 1 else 0.015
    )


@pytest.mark.parametrize("rule", ["none", "CFG(2)", "CFG(5)", "Interval", "linear"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if "eta" in s.options])
def test_ancestral_noise(name, eta, rule):
    """eta adds eta^2 of the reverse diffusion's noise; eta times it in the exponential integrators of that diffusion."""
    guidance, weight = RULES[rule]
    strength = eta if "sde" in name else eta**2
    assert variance(guidance, SAMPLERS[name](eta=eta), stochastic=True) == pytest.approx(expected(weight, strength), rel=0.05)


@pytest.mark.parametrize("rule", ["none", "CFG(2)", "Interval"])
@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if "churn" in s.options])
def test_churn(name, rule):
    """Churn S over a grid of length L in ln(sigma) raises the level by S / N in each of N steps: k = S / L."""
    guidance, weight = RULES[rule]
    churned = variance(guidance, SAMPLERS[name](churn=LENGTH / 2), stochastic=True)
    assert churned == pytest.approx(expected(weight, 0.5), rel=0.03)


@pytest.mark.parametrize("i", range(5))
def test_published_closed_forms(i):
    """Bradley & Nakkiran 2024: DDIM, DDPM and gamma-powered variances are three different numbers."""
    w = float(GOLDEN["gamma"][i])
    ddim, ddpm, powered = (float(GOLDEN[f"var_{k}"][i]) for k in ("cfg_ddim", "cfg_ddpm", "gamma_powered"))
    assert ddim == pytest.approx(VC**w * VU ** (1 - w))
    assert expected(lambda s: w) == pytest.approx(ddim, rel=1e-3)
    assert expected(lambda s: w, 1.0) == pytest.approx(ddpm, rel=1e-3)
    assert variance(CFG(w), SAMPLERS["ddim"]) == pytest.approx(ddim, rel=0.045)
    assert variance(CFG(w), SAMPLERS["heun"]) == pytest.approx(ddim, rel=1e-3)
    assert variance(CFG(w), SAMPLERS["euler_ancestral"], stochastic=True) == pytest.approx(ddpm, rel=0.045)
    if w > 1:
        assert ddim < 0.96 * ddpm < 0.9 * powered
