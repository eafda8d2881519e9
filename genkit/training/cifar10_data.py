"""CIFAR-10 as arrays, read from a pack of JPEG scans (keys ``header``, ``<split>_data``, ``_len``, ``_label``)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_split(path: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Decode one split.

    Args:
        path: the ``.npz`` pack. Image i is ``header + scan_i + FF D9``, one JPEG file.
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).

    Returns:
        Images (N, 3, 32, 32) as uint8, and labels (N,) as int64.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: ``split`` is neither name, or the file lacks its keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r} is not a file; give the CIFAR-10 JPEG pack (.npz)")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: use 'train' or 'test'")
    try:
        return _decode(path, split)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"data={str(path)!r} cannot be read: {error}") from None


def _decode(path: Path, split: str) -> tuple[Tensor, Tensor]:
    with np.load(path, allow_pickle=False) as pack:
        missing = {"header", f"{split}_data", f"{split}_len", f"{split}_label"} - set(pack.files)
        if missing:
            raise ValueError(f"it lacks the keys {sorted(missing)}; it has {pack.files}")
        header = pack["header"].tobytes()
        scans, ends = pack[f"{split}_data"], np.cumsum(pack[f"{split}_len"], dtype=np.int64)
        labels = torch.from_numpy(pack[f"{split}_label"].astype(np.int64))
    if len(ends) != len(labels) or (len(ends) and ends[-1] != len(scans)):
        raise ValueError(
            f"its {split} part has {len(labels)} labels, {len(ends)} lengths and {len(scans)} bytes, which do not agree"
        )
    images = np.empty((len(ends), 32, 32, 3), np.uint8)
    starts = np.concatenate([[0], ends[:-1]])
    for i, (a, b) in enumerate(tqdm(list(zip(starts, ends, strict=True)), desc=f"decode {split}", leave=False)):
        with Image.open(io.BytesIO(header + scans[a:b].tobytes() + b"\xff\xd9")) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels
