"""Weight curves and step ranges of public implementations, as Scheduled and Interval give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from genkit.guidance import CFG, Interval, Scheduled
from tests.toys import golden, step_info

CURVES, CURVES_META = golden("guidance/cfg_schedules")
ACTIVE, ACTIVE_META = golden("guidance/activity")
X = torch.zeros(1, 1)

# The producer counts steps up where the paper's t counts down: its curves run backwards (see orientation_warning in the file).
# Its weight is the factor of D_c - D_u beside D_c, so it is our w - 1. Names are the producer's; True: read it backwards.
ASYMMETRIC: dict[str, tuple[dict[str, Any], bool]] = {
    "constant_schedule": ({"shape": "constant"}, False),
    "linear_schedule": ({"shape": "linear"}, True),
    "clamp_linear_schedule_2": ({"shape": "linear", "clamp": 2.0}, True),
    "clamp_linear_schedule_4": ({"shape": "linear", "clamp": 4.0}, True),
    "clamp_cosine_schedule_2": ({"shape": "cosine", "clamp": 2.0}, True),
    "cosine_schedule": ({"shape": "cosine"}, True),
    "invlinear_schedule": ({"shape": "inverse_linear"}, True),
    "sine_schedule": ({"shape": "sine"}, True),
    "powered_cosine_schedule_0.1": ({"shape": "power_cosine", "power": 0.1, "preserve_mean": False}, True),
    "powered_cosine_schedule_1": ({"shape": "power_cosine", "power": 1.0, "preserve_mean": False}, True),
    "powered_cosine_schedule_4": ({"shape": "power_cosine", "power": 4.0, "preserve_mean": False}, True),
}
# Symmetric curves that the producer names or scales otherwise: its "v" is low-high-low without the factor 2 of an equal mean (our
# lambda, largest value 1), its "a" is w0 (1 + |2u - 1|) (our v, largest value 1, on top of a constant).
SYMMETRIC = {"v_shape_schedule": ("lambda", 0.0), "a_shape_schedule": ("v", 1.0)}


def gammas(**options: Any) -> np.ndarray:
    """w - 1 at every step."""
    total, w0 = CURVES_META["max_steps"] + 1, CURVES_META["w0"]
    guidance = Scheduled(CFG(w0 + 1), **options)
    return np.array([guidance.weight(step_info(X, i, total)) - 1 for i in range(total)])


def test_every_curve_is_compared() -> None:
    assert {c["key"] for c in CURVES_META["cases"]} == {*ASYMMETRIC, *SYMMETRIC} == set(CURVES)


@pytest.mark.parametrize("key", ASYMMETRIC)
def test_curve(key: str) -> None:
    options, backwards = ASYMMETRIC[key]
    theirs = CURVES[key][::-1] if backwards else CURVES[key]
    np.testing.assert_allclose(gammas(**options), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", SYMMETRIC)
def test_symmetric_curve(key: str) -> None:
    shape, offset = SYMMETRIC[key]
    ours = gammas(shape=shape, preserve_mean=False) + offset * CURVES_META["w0"]
    np.testing.assert_allclose(ours, CURVES[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [pytest.param(c, id=c["key"]) for c in ACTIVE_META["cases"]])
def test_range_in_fractions_of_the_steps(case: dict[str, Any]) -> None:
    guidance = Interval(CFG(3.0), case["start"], case["stop"], unit="fraction")
    total = case["num_inference_steps"]
    active = [len(guidance.plan(step_info(X, i, total), None)) == 2 for i in range(total)]
    assert active == ACTIVE[case["key"]].tolist()
