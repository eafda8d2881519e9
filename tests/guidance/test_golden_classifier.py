"""Classifier guidance and self-guided minority guidance against OpenAI's guided-diffusion and sg-minority.

All steps run through the library, but for the last ancestral one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import NoGuidance, Result, StepInfo
from genkit.guidance.classifier import ClassifierGuidance
from genkit.guidance.minority import SelfMinority
from genkit.noise import VE, VP
from genkit.random import Fixed
from genkit.samplers.diffusion import sample
from tests.toys import Classifier, Mixture, golden, step_info

ARRAYS, META = golden("guidance/classifier_and_minority")
CASES = {case["key"]: case for case in META["cases"]}
X, LABELS = (torch.from_numpy(ARRAYS[key]) for key in ("x", "labels"))
ABAR = np.cumprod(1 - ARRAYS["betas"])[ARRAYS["timestep_map"]]
SIGMAS = np.sqrt((1 - ABAR) / ABAR)
TOLERANCE = 1e-4  # of the recorded tables, in float32


class Unconditional:
    """The mixture over all classes, whatever the condition; clipped as the recorded sampler does it."""

    path = VE

    def __init__(self, clip: bool) -> None:
        self.inner, self.clip = Mixture.from_golden(ARRAYS), clip

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor, /) -> Tensor:
        out = self.inner(x, sigma, torch.full_like(condition, -1))
        return out.clamp(-1, 1) if self.clip else out


def classifier() -> Classifier:
    mean, cov, weight, prior = (
        torch.from_numpy(ARRAYS[f"gmm_{name}"]) for name in ("mu", "cov", "weight_given_class", "class_prior")
    )
    return Classifier(Mixture(mean, cov, prior[:, None] * weight, prior))  # the prior into the joint probability


class Replayed(Guided):
    """A run whose noise is the recorded one."""

    recorded: Tensor

    def noise(self, like: Tensor, info: StepInfo, draw: int = 0) -> Tensor:
        return self.recorded[1 + draw]  # the first one is the ancestral step's


def guided(guidance: Any, clip: bool) -> Replayed:
    return Replayed({"main": Unconditional(clip), "classifier": classifier()}, guidance, {"cond": LABELS}, len(X))


def first(t: int) -> StepInfo:
    return step_info(X, sigma=float(SIGMAS[t]), path=VP)


def assert_close(ours: Tensor, key: str) -> None:
    theirs = torch.from_numpy(ARRAYS[key])
    assert ours.dtype == torch.float64
    error = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    assert error < TOLERANCE, f"{key}: relative error {error:.1e}"


def beta(t: int) -> float:
    return float(1 - ABAR[t] / (ABAR[t - 1] if t else 1.0))


def ancestral(run: Callable[[StepInfo], Result], t: int, noise: Tensor) -> Tensor:
    """One step of the library's sampler with variance beta."""
    sigmas = torch.tensor([SIGMAS[t], SIGMAS[t - 1]])
    return sample(run, X, sigmas, "iddpm(fraction=1)", VP, Fixed(noise[None]))


@pytest.mark.parametrize("t", [249, 125, 1, 0])
def test_the_model_is_the_recorded_one(t: int) -> None:
    info = first(t)
    denoised = guided(NoGuidance(), clip=False)(info).denoised
    assert_close((X - info.alpha * denoised) / info.s, f"eps_t{t}")


@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("t", [249, 125, 1, 0])
def test_score(t: int, scale: float) -> None:
    result = guided(ClassifierGuidance(1 + scale), clip=False)(first(t))
    assert result.score is not None
    assert_close(result.score, f"classifier_grad_t{t}_s{scale:g}")


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("ddim_clf")])
def test_ddim_step(key: str) -> None:
    case = CASES[key]
    t, run = case["t"], guided(ClassifierGuidance(1 + case["scale"]), case["clip_denoised"])
    sigmas = torch.tensor([SIGMAS[t], SIGMAS[t - 1] if t else 0.0])
    noise, seen = Fixed(torch.from_numpy(ARRAYS[f"{key}__noise"])[None]), list[Result]()
    out = sample(run, X, sigmas, f"ddim(eta={case['eta']})", VP, noise, lambda info, result: seen.append(result))
    assert_close(seen[0].denoised, f"{key}__x0")
    assert_close(out, key)


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("ddpm_clf")])
def test_ancestral_step(key: str) -> None:
    case = CASES[key]
    t, run = case["t"], guided(ClassifierGuidance(1 + case["scale"]), case["clip_denoised"])
    if t:
        assert_close(ancestral(run, t, torch.from_numpy(ARRAYS[f"{key}__noise"])), key)
        return
    # Their last step moves the mean by the posterior variance of the step before, which a step to sigma = 0 does not know.
    result = run(first(0))
    assert result.score is not None
    assert_close(result.denoised + beta(1) * float((1 - ABAR[0]) / (1 - ABAR[1])) * result.score, key)


@pytest.mark.parametrize("t", [249, 125, 1])
def test_an_absorbed_score_moves_the_ancestral_mean_by_beta_to_first_order(t: int) -> None:
    sigmas, noise = torch.tensor([SIGMAS[t], SIGMAS[t - 1]]), Fixed(torch.zeros(1, *X.shape))
    rule = ClassifierGuidance(4.5)
    moved, plain = (sample(guided(g, False), X, sigmas, "ddim(eta=1)", VP, noise) for g in (rule, NoGuidance()))
    score = guided(rule, False)(first(t)).score
    assert score is not None
    torch.testing.assert_close(moved - plain, beta(t) / math.sqrt(1 - beta(t)) * score)


@pytest.mark.parametrize("key", [key for key in CASES if key.startswith("selfmin")])
def test_self_guided_minority_step(key: str) -> None:
    case = CASES[key]
    t, noise = case["t"], torch.from_numpy(ARRAYS[f"{key}__noise"])
    made = SelfMinority(
        1 + case["mg_scale"],
        at=float(SIGMAS[int(META["num_timesteps"] * case["p_ratio"])]),
        every=case["inter_rate"],
        draws=case["num_mc_samples"],
        normalized=case["use_normed_grad"],
    )
    run = guided(made, clip=False)
    run.recorded = noise

    def clipped(info: StepInfo) -> Result:
        result = run(info)
        assert result.score is not None
        score = result.score if case["mg_scale_type"] == "var" else result.score / beta(t)  # "fixed": no variance before it
        return result._replace(denoised=result.denoised.clamp(-1, 1), score=score)

    assert_close(ancestral(clipped, t, noise[0]), key)
    assert run.ledger.nfe == [2 + case["num_mc_samples"]] * 3


def test_every_case_is_used() -> None:
    kinds = ("ddim_clf", "ddpm_clf", "selfmin")
    assert [sum(key.startswith(kind) for key in CASES) for kind in kinds] == [32, 16, 6]
    assert len(CASES) == 54
