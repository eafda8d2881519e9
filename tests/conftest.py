"""For all tests."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    """Networks that a test builds without a seed have the same weights whatever ran before it in the process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what libraries draw from)
    torch.manual_seed(0)
