"""For all tests."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw without a seed is the same whatever ran before in the process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what libraries draw from)
    torch.manual_seed(0)
