"""Features of images, made once: blocks on disk under the content of the images, the network, and what is done in between."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit_eval.distributed import world
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.files import write_bytes
from genkit_eval.images import Batch, Images, Problems
from genkit_eval.metrics.colour import pixel_layers

BLOCK = 256
_POSITIONS = "positions"


@dataclass
class Rows:
    """Layers (n, D) float32 of images at ``positions`` (n,), numbers of their pixels, and what was wrong with others."""

    layers: dict[str, Tensor]
    positions: list[int]
    problems: Problems = field(default_factory=Problems)


@dataclass
class Stack:
    """Images of one size, ready for the network: which of the batch they are, pixels (n, 3, H, W), and numbers of these."""

    members: list[int]
    pixels: Tensor
    numbers: dict[str, Tensor]


def stacks_of(batch: Batch, pin: bool) -> list[Stack]:
    """The images of a batch, size by size; page-locked if ``pin``."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for k, image in enumerate(batch.pixels):
        shapes.setdefault(tuple(image.shape), []).append(k)
    found = []
    for members in shapes.values():
        pixels = torch.stack([batch.pixels[k] for k in members])
        found.append(Stack(members, pixels.pin_memory() if pin else pixels, pixel_layers(pixels)))
    return found


def ahead(batches: Iterator[Batch], pin: bool) -> Iterator[tuple[Batch, list[Stack]]]:
    """Batches with their stacks; while one is in the network, a thread makes the next one ready."""

    def following() -> tuple[Batch, list[Stack]] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, stacks_of(batch, pin))

    with ThreadPoolExecutor(1, thread_name_prefix="stack") as pool:
        coming = pool.submit(following)
        while (found := coming.result()) is not None:
            coming = pool.submit(following)
            yield found


def extract(extractor: Extractor, batch: Batch, stacks: Sequence[Stack]) -> Rows:
    """Features and pixel numbers of a batch.

    Raises InputError for images that the extractor does not take and for features that are not finite.
    """
    rows = Rows({}, list(batch.positions), batch.problems)
    for stack in stacks:
        shape = tuple(stack.pixels.shape[1:])
        if extractor.image_shape is not None and shape != tuple(extractor.image_shape):
            got, wanted = ("x".join(map(str, s)) for s in (shape, extractor.image_shape))
            raise InputError(
                "--size",
                f"extractor {extractor.name} takes images of {wanted} and these are {got}; "
                f"--size {extractor.image_shape[-1]} brings them there",
            )
        for name, values in (extractor(stack.pixels) | stack.numbers).items():
            if name not in rows.layers:
                rows.layers[name] = values.new_empty((len(batch.pixels), *values.shape[1:]))
            rows.layers[name][stack.members] = values
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
        self.keep: bool | None = None

    @property
    def blocks(self) -> dict[int, range]:
        """Positions of the images of each block."""
        total = len(self.images)
        return dict(enumerate(range(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK)))

    def __iter__(self) -> Iterator[Rows]:
        """Rows of each block. InputError when more files are unreadable than ``images.max_errors``."""
        self.problems = Problems()
        for rows in self._rows(self.blocks):
            self.problems.add(rows.problems)
            self.problems.check(self.images.max_errors, self.images.option)
            yield rows

    def _rows(self, blocks: dict[int, range]) -> Iterator[Rows]:
        known = {index for index in blocks if self.cache.has(index)}
        missing = [position for index, block in blocks.items() if index not in known for position in block]
        coming = ahead(self.images.batches(self.batch, missing, self.workers), self.pin) if missing else iter(())
        for index, block in blocks.items():
            if index in known:
                rows = self.cache.read(index)
                self.advance(len(block))
            else:
                rows = self._make(index, block, coming)
            yield rows

    def spread(self) -> None:
        """Put this process's share of the blocks into the cache; the first one waits until all have done so.

        What it does not find there afterwards, it makes itself: blocks with unreadable files, which are not kept, and all that
        machines with another cache folder have made. InputError without a cache.
        """
        if world().size == 1:
            return
        if self.cache.folder is None:
            raise InputError("--no-cache", "several processes exchange features through the cache; leave it out")
        start, advance = world().images, self.advance
        world().follow()
        moved = 0

        def show(more: int = 0) -> None:
            nonlocal moved
            world().advance(more)
            advance(world().images - start - moved)
            moved = world().images - start

        self.advance = show
        for _ in self._rows({index: block for index, block in self.blocks.items() if world().mine(index)}):
            pass
        world().gather(show)
        self.advance = lambda n: None

    def _make(self, index: int, block: range, coming: Iterator[tuple[Batch, list[Stack]]]) -> Rows:
        parts, asked = list[Rows](), 0
        while asked < len(block):
            batch, stacks = next(coming)
            asked += batch.asked
            parts.append(extract(self.extractor, batch, stacks))
            self.advance(batch.asked)
        rows = _join(parts)
        if self.keep is None and not self.cache.room_for(rows, len(self.images)):
            print(f"note: no room in {self.cache.folder} for features of {len(self.images):,} images; none kept", file=sys.stderr)
            self.keep = False
        if self.keep is not False:
            self.keep = True
            self.cache.write(index, rows)
        return rows
