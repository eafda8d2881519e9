"""APG against diffusers 0.42.1 and ACE-Step.

Three forms are around, with the same update ``u = d_perp + eta d_par``. Ours is the paper's, ``D_c + (w - 1) u`` (keys
``paper_``). Keys ``_orig`` are ``D_c + w u``: our scale is theirs plus 1. Keys ``_native`` are ``D_u + w u``, which no scale of
ours gives (at eta = 0 it is not the conditional prediction at w = 1): it is our result at scale w + 1, moved from D_c to D_u.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import APG, CFG, APGMix, Guidance, Interval
from tests.toys import golden, step_info

ARRAYS, META = golden("guidance/apg")
MOMENTUM, MOMENTUM_META = golden("guidance/apg_momentum")
# Norms and projections over the channel axis or over the two last axes alone: other methods, which APG here does not offer.
OTHER_AXES = {"img_f32_normdim1", "img_f32_normdim-1_-2"}
CASES = [pytest.param(case, id=case["key"]) for case in META["cases"] if case["key"] not in OTHER_AXES]
TOLERANCE = {torch.float16: 2e-3, torch.float32: 2e-6, torch.float64: 1e-12}


def pair(name: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(ARRAYS[f"{name}_cond"]), torch.from_numpy(ARRAYS[f"{name}_uncond"])


def one_step(
    guidance: Guidance, cond: Tensor, uncond: Tensor, state: Any = None, index: int = 0, total: int = 1
) -> tuple[Tensor, Any]:
    result, state = guidance.combine(step_info(cond, index, total), {"cond": cond, "uncond": uncond}, state)
    return result.denoised, state


def assert_close(ours: Tensor, theirs: Any) -> None:
    """To the rounding of the recorded dtype, relative to the largest value."""
    theirs = torch.as_tensor(theirs)
    error = (ours.double() - theirs.double()).abs().max() / (1 + theirs.double().abs().max())
    assert error <= TOLERANCE[theirs.dtype], f"{theirs.dtype}: relative error {error:.1e}"


def in_their_form(ours: Tensor, cond: Tensor, uncond: Tensor, original: bool) -> Tensor:
    return ours if original else ours.double() - cond.double() + uncond.double()


def test_every_case_is_used_or_named() -> None:
    keys = {case["key"] for case in META["cases"]}
    assert keys >= OTHER_AXES
    assert len(keys) == 109


@pytest.mark.parametrize("case", CASES)
def test_one_step(case: dict[str, Any]) -> None:
    cond, uncond = pair(case["inputs"])
    paper = "form" in case
    scale = case["guidance_scale"] + (not paper)
    ours, _ = one_step(APG(scale, case["eta"], threshold=case["norm_threshold"]), cond, uncond)
    assert ours.dtype == cond.dtype
    original = paper or case["use_original_formulation"]
    assert_close(in_their_form(ours, cond, uncond, original), ARRAYS[case["key"]])


@pytest.mark.parametrize("key", sorted(OTHER_AXES))
def test_norms_are_over_all_axes_of_a_sample(key: str) -> None:
    case = next(c for c in META["cases"] if c["key"] == key)
    ours, _ = one_step(APG(case["guidance_scale"] + 1, case["eta"], threshold=case["norm_threshold"]), *pair(case["inputs"]))
    assert (ours - torch.from_numpy(ARRAYS[key])).abs().max() > 0.1


@pytest.mark.parametrize("case", [pytest.param(c, id=c["key"]) for c in MOMENTUM_META["cases"]])
def test_momentum(case: dict[str, Any]) -> None:
    guidance = APG(case["guidance_scale"] + 1, case["eta"], case["momentum"], case["norm_threshold"])
    state = guidance.init(2)
    for i in range(6):
        cond, uncond = torch.from_numpy(MOMENTUM["cond"][i]), torch.from_numpy(MOMENTUM["uncond"][i])
        ours, state = one_step(guidance, cond, uncond, state, i, 6)
        assert_close(in_their_form(ours, cond, uncond, case["use_original_formulation"]), MOMENTUM[case["key"]][i])
        assert_close(state, MOMENTUM[f"{case['key']}__avg"][i])  # the state is the average before the clamp


def test_momentum_advances_only_inside_an_interval() -> None:
    p = MOMENTUM_META["interval_guider"]
    assert p["use_original_formulation"]
    inner = APG(p["guidance_scale"] + 1, p["eta"], p["momentum"], p["rescale"])
    guidance = Interval(inner, p["start"], p["stop"], "fraction")
    state = guidance.init(2)
    for i in range(6):
        cond, uncond = torch.from_numpy(MOMENTUM["cond"][i]), torch.from_numpy(MOMENTUM["uncond"][i])
        assert len(guidance.plan(step_info(cond, i, 6), state)) == MOMENTUM["interval_num_conditions"][i]
        ours, state = one_step(guidance, cond, uncond, state, i, 6)
        assert_close(ours, MOMENTUM["interval_guider"][i])


def test_mix_of_cfg_then_apg() -> None:
    arrays, meta = golden("guidance/apg_mix")
    p = meta["params"]
    name = "adaptive_projected_guidance_"
    # their second part is the "native" form
    apg = APG(p[f"{name}scale"] + 1, p["eta"], p[f"{name}momentum"], p[f"{name}rescale"])
    guidance = APGMix(CFG(p["guidance_scale"]), apg, p[f"{name}start_step"])
    state = guidance.init(2)
    for i in range(6):
        cond, uncond = torch.from_numpy(arrays["cond"][i]), torch.from_numpy(arrays["uncond"][i])
        ours, state = one_step(guidance, cond, uncond, state, i, 6)
        assert_close(in_their_form(ours, cond, uncond, original=i <= guidance.last), arrays["out"][i])
