"""Features of images, made once: blocks on disk under the content of the images, the network, and what is done in between."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.files import write_bytes
from genkit_eval.images import Batch, Images, Problems
from genkit_eval.metrics import colour
from genkit_eval.metrics.registry import PIXEL_LAYER

BLOCK = 256
#: What is kept of the pixels themselves, one number for each image.
PIXEL_COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    PIXEL_LAYER + "saturation": colour.saturation,
    PIXEL_LAYER + "contrast": colour.contrast,
    PIXEL_LAYER + "clipped": colour.clipped,
}
_POSITIONS = "positions"


@dataclass
class Rows:
    """Layers (n, D) float32 of images at ``positions`` (n,), numbers of their pixels, and what was wrong with others."""

    layers: dict[str, Tensor]
    positions: list[int]
    problems: Problems = field(default_factory=Problems)


def extract(extractor: Extractor, batch: Batch, pin: bool = False) -> Rows:
    """Features and pixel numbers of a batch; images of different sizes go through the network size by size.

    Raises InputError for images that the extractor does not take and for features that are not finite.
    """
    rows = Rows({}, list(batch.positions), batch.problems)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for k, image in enumerate(batch.pixels):
        shapes.setdefault(tuple(image.shape), []).append(k)
    for shape, members in shapes.items():
        if extractor.image_shape is not None and shape != tuple(extractor.image_shape):
            got, wanted = ("x".join(map(str, s)) for s in (shape, extractor.image_shape))
            raise InputError(
                "--size",
                f"extractor {extractor.name} takes images of {wanted} and these are {got}; "
                f"--size {extractor.image_shape[-1]} brings them there",
            )
        pixels = torch.stack([batch.pixels[k] for k in members])
        found = extractor(pixels.pin_memory() if pin else pixels)
        found |= {name: of_pixels(pixels)[:, None] for name, of_pixels in PIXEL_COLUMNS.items()}
        for name, values in found.items():
            if name not in rows.layers:
                rows.layers[name] = values.new_empty((len(batch.pixels), *values.shape[1:]))
            rows.layers[name][members] = values
    _check_finite(rows, extractor)
    return rows


def _check_finite(rows: Rows, extractor: Extractor) -> None:
    for name, values in rows.layers.items():
        bad = (~torch.isfinite(values)).any(dim=1)
        if bool(bad.any()):
            first = rows.positions[int(bad.nonzero()[0])]
            raise InputError(
                "--extractor", f"{extractor.name}: {name} of image {first} and {int(bad.sum()) - 1} more is not finite"
            )


def key_of(images: Images, extractor: Extractor) -> str:
    """SHA-256 over everything that features depend on."""
    parts = {
        "dataset": images.fingerprint,
        "view": [images.view.crop, images.view.size],
        "extractor": extractor.sha256,
        "resize": extractor.resize,
        "pillow": PIL.__version__,
        "layout": 1,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """Blocks of ``BLOCK`` images under ``<root>/features/<key>``. Without a root nothing is kept."""

    def __init__(self, root: Path | None, key: str) -> None:
        self.folder = None if root is None else root / "features" / key

    def path(self, index: int) -> Path:
        """File of block ``index``."""
        assert self.folder is not None
        return self.folder / f"{index:06d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether the block is there, whole and of this layout."""
        if self.folder is None or not self.path(index).exists():
            return False
        try:
            with safe_open(self.path(index), "pt") as handle:
                return _POSITIONS in handle.keys() and "problems" in (handle.metadata() or {})  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            return False

    def read(self, index: int) -> Rows:
        """A block that is there."""
        with safe_open(self.path(index), "pt") as handle:
            problems = Problems.from_dict(json.loads(handle.metadata()["problems"]))
            layers = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        return Rows(layers, layers.pop(_POSITIONS).tolist(), problems)

    def write(self, index: int, rows: Rows) -> None:
        """Store a block; one with unreadable files is left out, as they may be readable the next time."""
        if self.folder is None or rows.problems.errors:
            return
        tensors = {name: values.contiguous() for name, values in rows.layers.items()}
        tensors[_POSITIONS] = torch.tensor(rows.positions)
        write_bytes(self.path(index), save(tensors, {"problems": json.dumps(rows.problems.as_dict())}))

    def room_for(self, rows: Rows, images: int) -> bool:
        """Whether the disk holds all blocks of so many images, judged by ``rows``, and a tenth remains."""
        if self.folder is None or not rows.positions:
            return True
        bytes_each = sum(v.numel() * v.element_size() for v in rows.layers.values()) / len(rows.positions)
        place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        return bytes_each * images < 0.9 * shutil.disk_usage(place).free


def _join(parts: Sequence[Rows]) -> Rows:
    total = Rows({}, [p for part in parts for p in part.positions])
    for part in parts:
        total.problems.add(part.problems)
    names = dict.fromkeys(name for part in parts for name in part.layers)
    total.layers = {name: torch.cat([part.layers[name] for part in parts if name in part.layers]) for name in names}
    return total


class Features:
    """Features of ``images``, block by block in order, from the cache where they are there.

    Args:
        images: what to look at.
        extractor: the network.
        cache: folder for features, None keeps none.
        batch: images through the network at once, at most ``BLOCK``; rounded down to a power of two.
        workers: decoding threads, default one for each core.
        advance: called with the number of images that are done.
        pin: page-locked batches, for an accelerator.
    """

    def __init__(
        self,
        images: Images,
        extractor: Extractor,
        cache: Path | None = None,
        batch: int = 64,
        workers: int | None = None,
        advance: Callable[[int], object] = lambda n: None,
        pin: bool = False,
    ) -> None:
        self.images, self.extractor, self.workers, self.advance, self.pin = images, extractor, workers, advance, pin
        self.batch = 1 << (min(max(batch, 1), BLOCK).bit_length() - 1)
        self.cache = FeatureCache(cache, key_of(images, extractor) if cache is not None else "")
        self.problems = Problems()
        self.keep = True

    def __iter__(self) -> Iterator[Rows]:
        """Rows of each block. InputError when more files are unreadable than ``images.max_errors``."""
        self.problems = Problems()
        total = len(self.images)
        blocks = [range(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK)]
        known = {index for index in range(len(blocks)) if self.cache.has(index)}
        missing = [position for index, block in enumerate(blocks) if index not in known for position in block]
        coming = self.images.batches(self.batch, missing, self.workers) if missing else iter(())
        for index, block in enumerate(blocks):
            if index in known:
                rows = self.cache.read(index)
                self.advance(len(block))
            else:
                rows = self._make(index, block, coming)
            self.problems.add(rows.problems)
            self.problems.check(self.images.max_errors, self.images.option)
            yield rows

    def _make(self, index: int, block: range, coming: Iterator[Batch]) -> Rows:
        parts, asked = list[Rows](), 0
        while asked < len(block):
            batch = next(coming)
            asked += batch.asked
            parts.append(extract(self.extractor, batch, self.pin))
            self.advance(batch.asked)
        rows = _join(parts)
        if index == 0 and not self.cache.room_for(rows, len(self.images)):
            print(f"note: no room in {self.cache.folder} for features of {len(self.images):,} images; none kept", file=sys.stderr)
            self.keep = False
        if self.keep:
            self.cache.write(index, rows)
        return rows
