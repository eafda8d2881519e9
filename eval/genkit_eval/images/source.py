"""What every place with images offers: names in the order of their bytes, labels, contents, digests."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})

Content = bytes | np.ndarray[Any, Any]


class Source(ABC):
    """Images of one place.

    ``names`` are sorted by their bytes; ``labels`` has a class for each or is None; ``class_names`` says what the classes are
    called, as far as it is known; ``skipped`` names files that are not looked at, because they do not end like an image.
    """

    uri: str
    names: list[str]
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @abstractmethod
    def read(self, index: int) -> Content:
        """The encoded image ``index``, or its pixels (H, W, 3); may be called from several threads at once. May raise OSError."""

    @abstractmethod
    def digest(self, index: int) -> str:
        """A short text that changes when the image does."""


def is_image(name: str) -> bool:
    """Whether a path ends like an image and is not one of the files that systems hide beside them."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and "." in parts[-1] and "." + parts[-1].rsplit(".", 1)[1].lower() in ENDINGS


def in_byte_order(names: Sequence[str]) -> list[str]:
    """Sorted by the bytes of the path, whatever the locale."""
    return sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))


def folder_labels(names: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Class of each image from the folder it lies in, numbered in byte order; none where all lie in one folder."""
    folders = ["/".join(name.split("/")[:-1]) for name in names]
    if len(set(folders)) < 2:
        return None, ()
    own = [folder.rsplit("/", 1)[-1] for folder in folders]
    classes = in_byte_order(sorted(set(own)))
    number = {name: k for k, name in enumerate(classes)}
    return [number[name] for name in own], tuple(classes)


def json_labels(text: bytes, names: Sequence[str]) -> list[int] | None:
    """Labels of an EDM ``dataset.json``: ``{"labels": [[file name, class], ...]}``, a dict, or null.

    Raises ValueError when it is something else, or leaves images out.
    """
    found = json.loads(text)
    pairs = found.get("labels") if isinstance(found, dict) else None
    if pairs is None:
        return None
    try:
        known = {str(name).replace("\\", "/"): int(label) for name, label in dict(pairs).items()}
    except TypeError:
        raise ValueError("labels that are not one whole number for each image") from None
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"no label for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return [known[name] for name in names]
