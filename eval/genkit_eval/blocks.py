"""Blocks of consecutive images on disk: the unit of work that a killed run never repeats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit_eval.files import TEMPORARY, in_use, remove_leftovers, temporary_beside, write_bytes
from genkit_eval.metrics.colour import PIXEL_COLUMNS, pixel_layers

#: Images whose pixels are read back, for pictures.
SHOWN = 256
#: What the name of a further layer's tensor begins with.
LAYER = "layer."


@dataclass(frozen=True)
class Block:
    """Features (n, D) float32, labels and nfe (n,) int64 of n consecutive images, and their cost.

    ``pixels`` uint8 (m, 3, H, W) are those of the first m of them, as many as are kept, perhaps none.

    ``wall`` and ``cpu`` are seconds spent in generating all n images (features not included); ``calls`` counts network calls;
    ``trace`` holds the rows of the per-step trace, for the first block of a run only. ``made_with`` holds the different
    commits and devices that stored blocks were made with; a block not stored yet has none. ``layers`` are the extractor's other
    layers by name, each with n rows, among them what pixel metrics take from the pixels.
    """

    features: Tensor
    pixels: Tensor
    labels: Tensor
    nfe: Tensor
    wall: float
    cpu: float
    calls: int
    trace: list[dict[str, Any]]
    made_with: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.nfe.shape[0])


def _without_pixels(block: Block, most: int) -> Block:
    return replace(block, pixels=block.pixels[: max(most, 0)].clone())


def _first_pixels(parts: list[Block], used: list[int]) -> list[Tensor]:
    """Pixels up to the first image that has none: blocks of several commands may keep different numbers of them."""
    found = []
    for part, n in zip(parts, used, strict=True):
        found.append(part.pixels[:n])
        if len(part.pixels) < n:
            break
    return found


class BlockStore:
    """The blocks of one guidance: ``<folder>/NNNNN.safetensors``, each stamped with the configuration's hash.

    ``made_with`` (commit, device) is written into each new block beside it; it does not decide whether a block counts.
    """

    def __init__(self, folder: Path, config_hash: str, made_with: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.config_hash = config_hash
        self.made_with = made_with

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

    def taken(self, index: int) -> bool:
        """Whether another process is at work on block ``index``."""
        return any(in_use(path) for path in self.folder.glob(f"{self.path(index).name}.*{TEMPORARY}"))

    @contextmanager
    def claim(self, index: int) -> Iterator[None]:
        """While it lasts, other processes see block ``index`` as taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = temporary_beside(self.path(index))
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def write(self, index: int, block: Block) -> None:
        """Store a block under a temporary name and rename it into place."""
        tensors = {"features": block.features, "pixels": block.pixels, "labels": block.labels, "nfe": block.nfe}
        tensors |= {f"{LAYER}{name}": values for name, values in block.layers.items()}
        numbers = {"wall": block.wall, "cpu": block.cpu, "calls": block.calls, "trace": block.trace}
        made_with = [self.made_with] if self.made_with else []
        metadata = {"config": self.config_hash, "numbers": json.dumps(numbers), "made_with": json.dumps(made_with)}
        write_bytes(self.path(index), save({name: t.contiguous().cpu() for name, t in tensors.items()}, metadata))

    def read(self, index: int) -> Block:
        """Load a finished block."""
        with safe_open(self.path(index), "pt") as handle:
            metadata = handle.metadata() or {}
            numbers, made_with = json.loads(metadata["numbers"]), json.loads(metadata.get("made_with", "[]"))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        layers = {name.removeprefix(LAYER): tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)}
        if not layers.keys() & PIXEL_COLUMNS.keys():  # a block of an earlier version, which kept all pixels
            layers |= pixel_layers(tensors["pixels"])
        return Block(**tensors, **numbers, made_with=made_with, layers=layers)

    def read_all(self, total: int, block_size: int, shown: int = SHOWN) -> Block:
        """The first ``total`` images in index order, as one block; a block cut short costs in proportion.

        It holds pixels of the first ``shown`` images at most: those of all may not fit into memory.
        """
        parts = [_without_pixels(self.read(i), shown - i * block_size) for i in range(-(-total // block_size))]
        used = [min(block_size, total - i * block_size) for i in range(len(parts))]
        join = {
            name: torch.cat([getattr(part, name)[:n] for part, n in zip(parts, used, strict=True)])
            for name in ("features", "labels", "nfe")
        }
        layers = {
            name: torch.cat([part.layers[name][:n] for part, n in zip(parts, used, strict=True)]) for name in parts[0].layers
        }
        join["pixels"] = torch.cat(_first_pixels(parts, used))
        share = [n / len(part) for part, n in zip(parts, used, strict=True)]
        wall = sum(part.wall * s for part, s in zip(parts, share, strict=True))
        cpu = sum(part.cpu * s for part, s in zip(parts, share, strict=True))
        calls, made_with = sum(part.calls for part in parts), list[dict[str, Any]]()
        for known in (known for part in parts for known in part.made_with):
            if known not in made_with:
                made_with.append(known)
        return Block(**join, wall=wall, cpu=cpu, calls=calls, trace=parts[0].trace, made_with=made_with, layers=layers)

    def clear(self) -> None:
        """Remove every block, and what was left half written."""
        remove_leftovers(self.folder)
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
