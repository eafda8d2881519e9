"""Reading of the golden files of autoregressive models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "ar"


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float32 (some are stored as bfloat16, where that is exact) and the parameters of the run that made them."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["meta"])
    return {key: v.float() if v.dtype == torch.bfloat16 else v for key, v in tensors.items()}, meta


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def listed(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """``prefix.0``, ``prefix.1``, ..."""
    return [tensors[f"{prefix}.{i}"] for i in range(sum(key.startswith(f"{prefix}.") for key in tensors))]


def layout(project: str, file: str) -> dict[str, tuple[int, ...]]:
    """Key to shape of an official checkpoint."""
    with gzip.open(FOLDER / "official_state_dict_layouts.json.gz") as stream:
        keys = json.load(stream)[project][file]["keys"]
    return {key: tuple(shape) for key, (shape, _) in keys.items()}


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
