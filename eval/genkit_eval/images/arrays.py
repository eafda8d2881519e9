"""Arrays of images: the ``.npz`` of ADM and those who follow it, and plain ``.npy``."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from genkit_eval.errors import InputError
from genkit_eval.images.source import Source

_LOCAL_HEADER = struct.Struct("<26x2H")


class Arrays(Source):
    """``arr_0`` uint8 (N, H, W, 3) of an npz with ``arr_1`` labels where there are some, or a ``.npy``; not read as a whole."""

    def __init__(self, path: Path, option: str = "IMAGES") -> None:
        self.uri = str(path)
        try:
            self.pixels, self.stamp, labels = _npy(path) if path.suffix == ".npy" else _npz(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(option, f"{path} cannot be read as images ({error}); arr_0 uint8 (N, H, W, 3) works") from None
        shape, kind = self.pixels.shape, self.pixels.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise InputError(option, f"{path} holds {kind} {shape}; uint8 (N, H, W, 3) with values 0 to 255 works")
        self.names = [f"{k:08d}" for k in range(shape[0])]
        if labels is not None:
            if labels.shape != (shape[0],) or labels.dtype.kind not in "iu":
                raise InputError(option, f"{path}: arr_1 is {labels.dtype} {labels.shape}; a class number for each image works")
            self.labels = [int(label) for label in labels]

    def read(self, index: int) -> np.ndarray[Any, Any]:
        """Pixels (H, W, 3)."""
        return np.asarray(self.pixels[index])

    def digest(self, index: int) -> str:
        """CRC-32 of the whole array, and the place in it."""
        return f"{self.stamp}:{index}"


Found = tuple[np.ndarray[Any, Any], str, np.ndarray[Any, Any] | None]


def _npy(path: Path) -> Found:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return np.load(path, mmap_mode="r", allow_pickle=False), f"{crc:08x}", None


def _npz(path: Path) -> Found:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if "arr_0.npy" not in members:
            raise KeyError(f"no arr_0 among {', '.join(sorted(members)) or 'nothing'}")
        info = members["arr_0.npy"]
        with np.load(path, allow_pickle=False) as loaded:
            labels = loaded["arr_1"] if "arr_1.npy" in members else None
            mapped = _mapped(path, info) if info.compress_type == zipfile.ZIP_STORED else None
            return mapped if mapped is not None else loaded["arr_0"], f"{info.CRC:08x}", labels


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray[Any, Any] | None:
    """The array of a member that is not compressed, on disk as it lies there; None for a layout that has to be read."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        file.seek(info.header_offset + _LOCAL_HEADER.size + name + extra)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)
