"""Blocks of consecutive images on disk: the unit of work that a killed run never repeats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit_eval.files import TEMPORARY, write_bytes


@dataclass(frozen=True)
class Block:
    """Features (n, D) float32, pixels uint8 (n, 3, H, W), labels and nfe (n,) int64 of consecutive images, and their cost.

    ``wall`` and ``cpu`` are seconds spent in generating all n images (features not included); ``calls`` counts network calls;
    ``trace`` holds the rows of the per-step trace, for the first block of a run only.
    """

    features: Tensor
    pixels: Tensor
    labels: Tensor
    nfe: Tensor
    wall: float
    cpu: float
    calls: int
    trace: list[dict[str, Any]]

    def __len__(self) -> int:
        return int(self.nfe.shape[0])


class BlockStore:
    """The blocks of one guidance: ``<folder>/NNNNN.safetensors``, each stamped with the configuration's hash."""

    def __init__(self, folder: Path, config_hash: str) -> None:
        self.folder = folder
        self.config_hash = config_hash

    def path(self, index: int) -> Path:
        """File of block ``index``."""
        return self.folder / f"{index:05d}.safetensors"

    def done(self, index: int, count: int) -> bool:
        """Whether block ``index`` exists, is readable, has at least ``count`` images and comes from this configuration."""
        try:
            with safe_open(self.path(index), "pt") as handle:
                metadata = handle.metadata() or {}
                return metadata.get("config") == self.config_hash and handle.get_slice("nfe").get_shape()[0] >= count
        except (OSError, SafetensorError):
            return False

    def write(self, index: int, block: Block) -> None:
        """Store a block under a temporary name and rename it into place."""
        tensors = {"features": block.features, "pixels": block.pixels, "labels": block.labels, "nfe": block.nfe}
        numbers = {"wall": block.wall, "cpu": block.cpu, "calls": block.calls, "trace": block.trace}
        metadata = {"config": self.config_hash, "numbers": json.dumps(numbers)}
        write_bytes(self.path(index), save({name: t.contiguous().cpu() for name, t in tensors.items()}, metadata))

    def read(self, index: int) -> Block:
        """Load a finished block."""
        with safe_open(self.path(index), "pt") as handle:
            numbers = json.loads((handle.metadata() or {})["numbers"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        return Block(**tensors, **numbers)

    def read_all(self, total: int, block_size: int) -> Block:
        """The first ``total`` images in index order, as one block; a block cut short costs in proportion."""
        parts = [self.read(index) for index in range(-(-total // block_size))]
        used = [min(block_size, total - i * block_size) for i in range(len(parts))]
        join = {
            name: torch.cat([getattr(part, name)[:n] for part, n in zip(parts, used, strict=True)])
            for name in ("features", "pixels", "labels", "nfe")
        }
        share = [n / len(part) for part, n in zip(parts, used, strict=True)]
        wall = sum(part.wall * s for part, s in zip(parts, share, strict=True))
        cpu = sum(part.cpu * s for part, s in zip(parts, share, strict=True))
        return Block(**join, wall=wall, cpu=cpu, calls=sum(part.calls for part in parts), trace=parts[0].trace)

    def clean(self, everything: bool = False) -> None:
        """Remove what a killed process left half written; with ``everything`` the finished blocks too."""
        for pattern in [f"*{TEMPORARY}", *(["*.safetensors"] if everything else [])]:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
