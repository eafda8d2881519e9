"""Rescale, dynamic thresholding, TCFG, FDG, RAAG and APG-mix against the public code they are known from.

The predictions recorded are those of each method's native space: they are brought to x0 and the result back, so that the
conversion is part of what is compared. Keys ``_native`` are ``u + w (...)``, keys ``_orig`` ``c + w (...)``: our
scale is theirs plus 1 there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.guidance import APG, CFG, Guidance
from genkit.guidance.apg_mix import APGMix
from genkit.guidance.dynamic_thresholding import DynamicThresholding
from genkit.guidance.fdg import FDG, collapse, pyramid
from genkit.guidance.raag import RAAG
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.tcfg import TCFG
from genkit.noise import FLOW
from tests.toys import golden, step_info

RESCALE, RESCALE_META = golden("guidance/cfg_rescale")
THRESHOLD, THRESHOLD_META = golden("guidance/dynamic_thresholding")
TANGENT, TANGENT_META = golden("guidance/tcfg")
BANDS, BANDS_META = golden("guidance/fdg")
MAGNITUDE, MAGNITUDE_META = golden("guidance/magnitude_aware")
MIX, MIX_META = golden("guidance/apg_mix")


def cases(meta: dict[str, Any]) -> Any:
    return [pytest.param(case, id=case["key"]) for case in meta["cases"]]


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).double()


def run(guidance: Guidance, cond: Tensor, uncond: Tensor, space: noise.Space, **step: Any) -> Tensor:
    """One evaluation of predictions in ``space``, given back in it, at alpha = 0.4 and s = 0.6 of the flow path."""
    x = torch.linspace(-2, 2, cond.numel(), dtype=torch.float64).reshape(cond.shape)
    info = step_info(x, sigma=1.5, path=FLOW, **step)
    at = (x, info.alpha, info.s, space)
    predictions = {"cond": noise.to_x0(cond, *at), "uncond": noise.to_x0(uncond, *at)}
    result, _ = guidance.combine(info, predictions, guidance.init(len(x)))
    return noise.from_x0(result.denoised, *at)


def assert_close(ours: Tensor, theirs: np.ndarray, tolerance: float = 2e-5) -> None:
    error = (ours - tensor(theirs)).abs().max() / (1 + tensor(theirs).abs().max())
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("case", cases(RESCALE_META))
@pytest.mark.parametrize("space", noise.SPACES)
def test_rescale(case: dict[str, Any], space: noise.Space) -> None:
    cond, uncond = (tensor(RESCALE[f"{case['inputs']}_{name}"]) for name in ("cond", "uncond"))
    scale = case["guidance_scale"] + case["use_original_formulation"]
    guidance = Rescaled(CFG(scale), case["guidance_rescale"], space=space)
    assert_close(run(guidance, cond, uncond, space), RESCALE[case["key"]], 2e-6)


THEIR_CASE = {"AD": "max", "STD": "std", "MEAN": "mean", "ZERO": "zero"}


@pytest.mark.parametrize("case", cases(THRESHOLD_META))
@pytest.mark.parametrize("i", range(3))
def test_dynamic_thresholding(case: dict[str, Any], i: int) -> None:
    cond, uncond = tensor(THRESHOLD["cond"]), tensor(THRESHOLD["uncond"])
    rises = {"Constant": 1.0, "Half Cosine Up": 1 - math.cos(case["steps"][i] / (case["max_steps"] - 1))}[case["cfg_mode"]]
    assert case["mimic_mode"] == case["cfg_mode"]
    constant = case["cfg_mode"] == "Constant"
    scales = [
        full if constant else low + (full - low) * rises
        for full, low in ((case["cfg_scale"], case["cfg_scale_min"]), (case["mimic_scale"], case["mimic_scale_min"]))
    ]
    guidance = DynamicThresholding(
        *scales,
        percentile=case["threshold_percentile"],
        per_channel=case["separate_feature_channels"],
        measure=THEIR_CASE[case["variability_measure"]],  # type: ignore[arg-type]
        start=THEIR_CASE[case["scaling_startpoint"]],  # type: ignore[arg-type]
        phi=case["interpolate_phi"],
    )
    shape = cond.shape
    if not guidance.per_channel:  # they measure over the whole batch: here it is one sample with all their channels
        cond, uncond = cond.flatten(0, 1)[None], uncond.flatten(0, 1)[None]
    assert_close(run(guidance, cond, uncond, "x0").reshape(shape), THRESHOLD[case["key"]][i])


@pytest.mark.parametrize("case", cases(TANGENT_META))
def test_tcfg(case: dict[str, Any]) -> None:
    cond, uncond = (tensor(TANGENT[f"{case['inputs']}_{name}"]) for name in ("cond", "uncond"))
    ours = run(TCFG(case["guidance_scale"] + case["use_original_formulation"]), cond, uncond, "eps")
    assert_close(ours, TANGENT[case["key"]], 1e-5)


@pytest.mark.parametrize("case", cases(BANDS_META))
def test_fdg(case: dict[str, Any]) -> None:
    cond, uncond = (tensor(BANDS[f"{case['inputs']}_{name}"]) for name in ("cond", "uncond"))
    parallel = tuple(case.get("parallel_weights", [1.0] * len(case["guidance_scales"])))
    # Their first form adds the shift w times to U_i, ours w - 1 times to L_i: not the same once part of it is dropped.
    moved = "parallel_weights" in case
    original = case.get("use_original_formulation", False)
    guidance: Guidance = FDG(tuple(w + (original or moved) for w in case["guidance_scales"]), parallel)
    if "guidance_rescale" in case:
        guidance = Rescaled(guidance, case["guidance_rescale"], space="x0")
    ours = run(guidance, cond, uncond, "x0")
    assert_close(ours - cond + uncond if moved else ours, BANDS[case["key"]], 2e-6)


@pytest.mark.parametrize("name", ["a", "b"])
def test_laplacian_pyramid(name: str) -> None:
    bands = pyramid(tensor(BANDS[f"{name}_cond"]), 2)
    for i, band in enumerate(bands):
        assert_close(band, BANDS[f"{name}_cond_laplacian2_level{i}"], 1e-6)
    assert_close(collapse(bands), BANDS[f"{name}_cond"], 1e-12)


@pytest.mark.parametrize("case", cases(MAGNITUDE_META))
def test_raag(case: dict[str, Any]) -> None:
    cond, uncond = tensor(MAGNITUDE["cond"]), tensor(MAGNITUDE["uncond"])
    ours = run(RAAG(case["guidance_scale"] + case["use_original_formulation"], case["alpha"]), cond, uncond, "flow")
    assert_close(ours, MAGNITUDE[case["key"]], 2e-6)


def test_apg_mix() -> None:
    p, name = MIX_META["params"], "adaptive_projected_guidance_"
    then = APG(p[f"{name}scale"] + 1, p["eta"], p[f"{name}momentum"], p[f"{name}rescale"])
    guidance = APGMix(CFG(p["guidance_scale"]), then, p[f"{name}start_step"])
    state = guidance.init(2)
    for i in range(6):
        cond, uncond = tensor(MIX["cond"][i]), tensor(MIX["uncond"][i])
        result, state = guidance.combine(step_info(cond, i, 6), {"cond": cond, "uncond": uncond}, state)
        # their second part adds the same update to D_u
        assert_close(result.denoised if i <= guidance.last else result.denoised - cond + uncond, MIX["out"][i], 2e-6)
