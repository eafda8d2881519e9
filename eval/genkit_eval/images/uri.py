"""One rule for naming images: a path, or ``scheme:place?key=value&...``."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

import torch

from genkit_eval.errors import InputError
from genkit_eval.images.arrays import Arrays
from genkit_eval.images.containers import Folder, Zip
from genkit_eval.images.dataset import Images
from genkit_eval.images.hub import Hub
from genkit_eval.images.source import Source
from genkit_eval.images.tar import Tar
from genkit_eval.images.view import View

SCHEMES = ("folder", "imagenet", "zip", "tar", "wds", "npz", "npy", "hf")
COMMON = ("size", "crop", "n", "order", "max_errors")
OWN = {"hf": ("split", "revision", "config", "image", "label"), "imagenet": ("split",)}
IMAGENET_PLACES = ("{split}", "ILSVRC/Data/CLS-LOC/{split}", "Data/CLS-LOC/{split}")


def split_uri(uri: str, option: str) -> tuple[str, str, dict[str, str]]:
    """(scheme, place, keys); the scheme is empty for a plain path. InputError for a key that means nothing."""
    if Path(uri).exists():
        return "", uri, {}
    head, _, query = uri.partition("?")
    scheme, colon, place = head.partition(":")
    if not colon or scheme not in SCHEMES:
        scheme, place = "", head
    keys = dict(parse_qsl(query, keep_blank_values=True))
    known = (*COMMON, *OWN.get(scheme, ()))
    if unknown := set(keys) - set(known):
        raise InputError(option, f"{uri}: unknown key {sorted(unknown)[0]!r}; one of {', '.join(known)} works")
    return scheme, place, keys


def expand(pattern: str) -> list[str]:
    """Paths of ``a-{0000..0012}.tar``, ``a-{x,y}.tar`` and ``a-*.tar``; a pattern without any of these is itself."""
    found = re.search(r"\{([^{}]+)\}", pattern)
    if found:
        inner = found.group(1)
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
        parts = inner.split(",")
        if numbers:
            first, last = numbers.groups()
            parts = [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)]
        return [path for part in parts for path in expand(pattern[: found.start()] + part + pattern[found.end() :])]
    return sorted(glob.glob(pattern)) if "*" in pattern else [pattern]


def _imagenet(root: Path, split: str) -> Path:
    places = [root / place.format(split=split) for place in IMAGENET_PLACES]
    return next((place for place in places if place.is_dir()), root)


def _kind(place: str, option: str) -> str:
    path = Path(place)
    if path.is_dir():
        return "folder"
    ending = path.suffix.lower().removeprefix(".")
    if ending not in ("zip", "tar", "npz", "npy"):
        what = "is not a folder, .zip, .tar, .npz or .npy" if path.exists() else "does not exist"
        raise InputError(option, f"{place} {what}; those work, and hf:NAME")
    return ending


def open_source(uri: str, option: str = "IMAGES") -> tuple[Source, dict[str, str]]:
    """The source behind ``uri``, and its query keys."""
    scheme, place, keys = split_uri(uri, option)
    scheme = scheme or _kind(place, option)
    if scheme == "hf":
        return Hub(place, keys, option), keys
    paths = [Path(path) for path in expand(place)]
    absent = [path for path in paths if not path.exists()]
    if absent or not paths:
        raise InputError(option, f"there is no {absent[0] if absent else place}")
    if scheme in ("tar", "wds"):
        return Tar(paths, place, option), keys
    if len(paths) > 1:
        raise InputError(option, f"{uri}: only tar and wds take several files")
    if scheme == "imagenet":
        return Folder(_imagenet(paths[0], keys.get("split", "train")), option), keys
    readers: dict[str, Callable[[Path, str], Source]] = {"folder": Folder, "zip": Zip, "npz": Arrays, "npy": Arrays}
    return readers[scheme](paths[0], option), keys


def choose(total: int, count: int | None, order: str, option: str) -> Sequence[int]:
    """Indices used: the first ``count`` of the order, which is "sorted" or "shuffle:SEED"."""
    if count is not None and not 1 <= count <= total:
        raise InputError(option, f"got {count} images to use of {total}; 1 to {total} works")
    used = total if count is None else count
    if order == "sorted":
        return range(used)
    rule, _, seed = order.partition(":")
    if rule != "shuffle" or not seed.isdecimal():
        raise InputError(option, f"order: got {order!r}; 'sorted' or 'shuffle:SEED', for example shuffle:0, works")
    generator = torch.Generator().manual_seed(int(seed))
    chosen: list[int] = torch.randperm(total, generator=generator)[:used].tolist()
    return chosen


def _number(keys: dict[str, str], key: str, given: int | None, option: str) -> int | None:
    text = keys.get(key)
    if text is None:
        return given
    if not text.isdecimal():
        raise InputError(option, f"{key}: got {text!r}; a whole number works")
    return int(text)


def open_images(
    uri: str,
    size: int | None = None,
    crop: str | None = None,
    num_images: int | None = None,
    max_errors: int = 0,
    option: str = "IMAGES",
) -> Images:
    """Images named by a path or URI.

    A path is a folder (subfolders are classes), ``.zip``, ``.tar``, ``.npz`` (ADM) or ``.npy``. A URI says the kind:
    ``folder:``, ``imagenet:ROOT?split=val``, ``zip:``, ``tar:`` and ``wds:`` (``x-{0000..0099}.tar``), ``npz:``,
    ``hf:NAME?split=...``, with keys ``size``, ``crop``, ``n``, ``order`` (``shuffle:SEED``) and ``max_errors``.

    Args:
        uri: path or URI; its keys come before the arguments.
        size: side in pixels, default as stored.
        crop: key of ``CROPS``; default "adm" with a size, "none" without.
        num_images: use the first so many, default all.
        max_errors: unreadable files that are left out before it is an error, default 0.
        option: what errors call the argument.

    Raises:
        InputError: there is nothing there, no images, or a key or value does not work.
    """
    source, keys = open_source(uri, option)
    side = _number(keys, "size", size, option)
    view = View(side, keys.get("crop") or crop or ("none" if side is None else "adm"))
    chosen = choose(len(source.names), _number(keys, "n", num_images, option), keys.get("order", "sorted"), option)
    return Images(source, view, chosen, _number(keys, "max_errors", max_errors, option) or 0, option)
