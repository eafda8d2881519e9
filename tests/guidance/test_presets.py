"""Presets: every row can be made, says where it is from, and has its published weights."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.guidance import Guidance, parse
from genkit.guidance.presets import PRESETS, Preset, preset
from genkit.noise import edm
from tests.toys import step_info


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_every_row_can_be_made(row: Preset) -> None:
    made = preset(row.name)
    assert isinstance(made, Guidance)
    assert made == parse(row.expression) == parse(repr(made))
    assert getattr(made, "scale", 1.0) > 1
    assert row.model
    assert row.source
    assert row.metric is None or math.isfinite(float(row.metric.split()[-1]))


def test_names_are_unique_and_plain() -> None:
    names = [row.name for row in PRESETS]
    assert len(set(names)) == len(names)
    assert all(name == name.strip().lower() for name in names)
    assert preset(" Wan2.1/CFG ") == preset("wan2.1/cfg")


def test_the_interval_is_that_of_the_published_steps() -> None:
    """Steps 17 to 22 of the 32 of EDM's grid."""
    made, grid = preset("edm2-xxl-512/interval"), edm(32)
    x = torch.zeros(1, 1)
    guided = [i for i in range(32) if made.weight(step_info(x, i, 32, sigma=float(grid[i]))) == 2]
    assert guided == [17, 18, 19, 20, 21, 22]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edm2-s-512/autoguidanc", "preset='edm2-s-512/autoguidanc' is unknown; did you mean edm2-s-512/autoguidance"),
        ("SDXL/intervall", "did you mean sdxl/interval"),
        ("zzzz", "use one of edm2-s-512/autoguidance, .*adm-lsun/minority"),
        ("", "is unknown; use one of"),
        (None, "preset=None is unknown"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name)
