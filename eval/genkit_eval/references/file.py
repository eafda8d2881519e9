"""Reference files: our own safetensors, and the npz that ADM's evaluator reads."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genkit.files import write_atomically
from genkit_eval.errors import InputError
from genkit_eval.files import temporary_beside
from genkit_eval.metrics.moments import Moments
from genkit_eval.references.contents import MAIN, Contents, Layer, moments_from

FORMAT = "genkit-reference/2"
PIXELS = "pixels"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}


def _named(contents: Contents) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in contents.layers.items():
        prefix = "" if name == MAIN else f"{name}."
        if layer.moments is not None:
            found |= {f"{prefix}mean": layer.moments.mean, f"{prefix}cov": layer.moments.cov}
        if layer.features is not None:
            found[f"{prefix}features"] = layer.features
    if contents.pixels is not None:
        found[PIXELS] = contents.pixels
    return {name: found[name].contiguous() for name in sorted(found)}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _pour(file: BinaryIO, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """The safetensors layout, written here for its order: the library's differs each time, and the file's hash too."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def write_safetensors(path: Path, contents: Contents) -> None:
    """Write a reference; equal contents give equal bytes. What was there before stays whole if writing fails."""
    tensors = _named(contents)
    about = contents.about | {"format": FORMAT, "cov_ddof": "1", "tensors_sha256": _digest(tensors)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _pour(file, tensors, about)

    write_atomically(path, write, temporary_beside(path))


def read_safetensors(path: Path, option: str) -> Contents:
    """Read a reference of ours; InputError when it is missing, damaged, or not one."""
    try:
        with safe_open(path, "pt") as handle:
            about: dict[str, str] = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(option, f"{path} cannot be read as safetensors ({error})") from None
    missing = [key for key in ("mean", "cov", "features") if key not in tensors and about.get("format") != FORMAT]
    missing += [key for key in ("num_images", "extractor_sha256") if key not in about]
    if missing:
        raise InputError(option, f"{path} lacks {', '.join(missing)}")
    if about.get("tensors_sha256", _digest(tensors)) != _digest(tensors):
        raise InputError(option, f"{path} is damaged: its numbers do not have the hash that was written with them")
    return _assemble(path, tensors, about, option)


def _assemble(path: Path, tensors: dict[str, Tensor], about: dict[str, str], option: str) -> Contents:
    pixels = tensors.pop(PIXELS, None)
    count = about["num_images"]
    if not count.isdecimal() or int(count) == 1:
        raise InputError(option, f"{path} says num_images is {count!r}; a whole number from 2 on works")
    layers = {}
    for name in dict.fromkeys(key.rpartition(".")[0] or MAIN for key in tensors):
        prefix = "" if name == MAIN else f"{name}."
        mean, cov, features = (tensors.get(f"{prefix}{key}") for key in ("mean", "cov", "features"))
        layers[name] = make_layer(int(count), mean, cov, features, f"{path}: {name}", option)
    return Contents(layers, about, pixels)


def make_layer(count: int, mean: Tensor | None, cov: Tensor | None, features: Tensor | None, where: str, option: str) -> Layer:
    """A layer from what a file has of it; InputError when shapes do not agree or nothing is there."""
    if features is not None and features.ndim != 2:
        raise InputError(option, f"{where}: got features {tuple(features.shape)}; (M, D) works")
    moments: Moments | None = None
    if mean is not None and cov is not None:
        width = mean.shape[0] if mean.ndim == 1 else -1
        if cov.shape != (width, width) or (features is not None and features.shape[1] != width):
            rows = "" if features is None else f" and features {tuple(features.shape)}"
            got = f"mean {tuple(mean.shape)}{rows} with covariance {tuple(cov.shape)}"
            raise InputError(option, f"{where}: got {got}; they do not agree on the number of columns")
        moments = moments_from(count, mean, cov)
    if moments is None and features is None:
        raise InputError(option, f"{where} has neither mean and covariance nor features")
    return Layer(moments, features)


ADM_NAMES = {MAIN: ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def write_npz(path: Path, contents: Contents) -> None:
    """Write ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` and ``arr_0`` as ADM's evaluator reads them.

    Further keys, which it does not look at: ``n``, ``features``, ``meta`` (JSON of what is known). Layers that ADM has no name
    for are called ``<layer>_mu`` and ``<layer>_sigma``.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, layer in contents.layers.items():
        mu, sigma = ADM_NAMES.get(name, (f"{name}_mu", f"{name}_sigma"))
        if layer.moments is not None:
            arrays |= {mu: layer.moments.mean.numpy(), sigma: layer.moments.cov.numpy()}
        if name == MAIN and layer.features is not None:
            arrays["features"] = layer.features.numpy()
    if contents.pixels is not None:
        arrays["arr_0"] = contents.pixels.numpy()
    arrays |= {"n": np.array(contents.num_images), "meta": np.array(json.dumps(contents.about, sort_keys=True))}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy adds an ending of its own
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write, temporary_beside(path))


def rows_to_keep(names: Iterable[str], widths: dict[str, int], total: int, mains: Iterable[str] = (MAIN,)) -> set[str]:
    """Layers whose features are stored: main ones, and those with fewer images than columns, where moments are not exact."""
    return {name for name in names if name in mains or total <= widths[name]}
