"""The kept images of a finished run as files that other tools read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from genkit.files import write_atomically
from genkit_eval.blocks import BlockStore
from genkit_eval.compare import Side
from genkit_eval.errors import InputError
from genkit_eval.files import temporary_beside, write_bytes
from genkit_eval.report.grid import png_bytes


def _kept(side: Side) -> Iterator[tuple[Tensor, list[int]]]:
    """Pixels (m, 3, H, W) and labels, block by block, up to the first image whose pixels were not kept."""
    store = BlockStore(side.run.folder / side.entry["slug"] / "blocks", side.entry["config_sha256"])
    size, left = side.run.results["generation"].get("block_size"), side.entry["n"]
    for index in range(-(-left // size) if size else 0):
        if not store.done(index, 1):
            return
        block = store.read(index)
        pixels = block.pixels[: min(left, size)]
        yield pixels, block.labels[: len(pixels)].tolist()
        left -= size
        if len(pixels) < min(size, left + size):
            return


def _named(side: Side) -> Iterator[tuple[str, bytes]]:
    """``<class>/<image>.png`` and its bytes: what ``score`` and other tools read classes from."""
    count = 0
    for pixels, labels in _kept(side):
        for image, label in zip(pixels, labels, strict=True):
            yield f"{label:04d}/{count:06d}.png", png_bytes(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
            count += 1


def _write_zip(side: Side, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed
        for name, content in _named(side):
            archive.writestr(zipfile.ZipInfo(name), content)


def _write_npz(side: Side, path: Path, count: int) -> None:
    """ADM's: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` the classes. Block by block, as all images may not fit into memory."""
    channels, height, width = side.run.results["generation"]["image_shape"]
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    found: list[int] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, about)
            for pixels, labels in _kept(side):
                file.write(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                found += labels
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(found, np.int64))


def export(side: Side, to: Path) -> tuple[int, int]:
    """Write the kept images to ``to``: ``.npz`` as ADM's evaluator reads them, ``.zip`` or a folder of PNGs by class.

    Returns how many were written, and how many the run made. Raises InputError where none were kept, and for an existing folder
    that is not empty.
    """
    count = sum(len(labels) for _, labels in _kept(side))
    total: int = side.entry["n"]
    if not count:
        raise InputError("RUN", f"{side.label} has kept no images; run --keep-images N keeps them")
    write: Any = {".zip": lambda path: _write_zip(side, path), ".npz": lambda path: _write_npz(side, path, count)}.get(to.suffix)
    if write is not None:
        if to.is_dir():
            raise InputError("--to", f"{to} is a folder; the name of a file works")
        write_atomically(to, write, temporary_beside(to))
        return count, total
    if to.suffix or to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise InputError("--to", f"got {to}; a .zip, an .npz (ADM's), or a new folder works")
    for name, content in _named(side):
        write_bytes(to / name, content)
    return count, total
