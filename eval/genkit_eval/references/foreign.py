"""References that other tools wrote: npz of ADM, pytorch-fid, clean-fid and dgm-eval, pkl of EDM2, pt of torch-fidelity."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.metrics.moments import moments_of
from genkit_eval.references.contents import MAIN, Contents, Layer
from genkit_eval.references.file import ADM_NAMES, make_layer
from genkit_eval.references.safepickle import load_numbers, load_torch

#: The resize rule that a format implies; "" where tools of several rules write the same layout.
IMPLIED_RESIZE = {"ADM npz": "adm", "torch-fidelity pt": "tf1"}
#: Entries of an EDM2 pkl, and the resize rule of each.
EDM2_ENTRIES = {"fid": "tf1", "fd_dinov2": "torch-bicubic-antialias"}
ENDINGS = (".npz", ".pkl", ".pt", ".pth")


def _tensor(value: Any, where: str, option: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise InputError(option, f"{where} is {type(value).__name__}; an array of numbers works")
    return torch.from_numpy(np.array(value.astype(value.dtype.newbyteorder("="))))


def _from_arrays(path: Path, arrays: dict[str, Any], count: int, kind: str, option: str) -> dict[str, Layer]:
    """Layers from mu/sigma pairs and from features (``features``, ``feats``, ``reps``)."""
    layers: dict[str, Layer] = {}
    names = dict(ADM_NAMES) | {k.removesuffix("_mu"): (k, f"{k.removesuffix('_mu')}_sigma") for k in arrays if k.endswith("_mu")}
    for layer, (mu, sigma) in names.items():
        if mu in arrays and sigma in arrays:
            mean, cov = (_tensor(arrays[key], f"{path}: {key}", option) for key in (mu, sigma))
            layers[layer] = make_layer(count, mean, cov, None, f"{path}: {mu}, {sigma}", option)
    rows = next((key for key in ("features", "feats", "reps") if key in arrays), None)
    if rows is not None:
        features = _tensor(arrays[rows], f"{path}: {rows}", option)
        if features.ndim != 2 or len(features) < 2:
            raise InputError(option, f"{path}: {rows} has shape {tuple(features.shape)}; (N, D) works")
        known = layers.get(MAIN)
        layers[MAIN] = Layer(known.moments if known else moments_of(features), features)
    if not layers:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise InputError(option, f"{path} holds {found}; mu and sigma, feats or reps work ({kind})")
    return layers


def read_npz(path: Path, option: str) -> Contents:
    """Statistics of ADM (``mu``, ``sigma``, ``mu_s``, ``sigma_s``, ``arr_0``), pytorch-fid, clean-fid, dgm-eval, or ours.

    ``arr_0`` is left on disk: where it is, ``about`` has the key ``images``.
    """
    try:
        with np.load(path, allow_pickle=False) as loaded:
            wanted = [k for k in loaded.files if k not in ("arr_0", "arr_1", "hparams", "model")]
            arrays = {key: loaded[key] for key in wanted}
            images = "arr_0" in loaded.files
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(option, f"{path} cannot be read as npz ({error})") from None
    about = _meta(arrays.pop("meta", None), path, option)
    count = int(arrays.pop("n", 0)) or 0
    rows = next((arrays[key] for key in ("feats", "reps") if key in arrays), None)
    if not count and rows is not None and rows.ndim == 2:
        count = len(rows)
    kind = "ADM npz" if images or "mu_s" in arrays else "npz of features" if rows is not None else "npz of mu and sigma"
    if images and not arrays:
        raise InputError(option, f"{path} holds images and no statistics; build a reference from it, or score it as images")
    layers = _from_arrays(path, arrays, count, kind, option)
    known = {"format": kind, "num_images": str(count), **({"images": "arr_0"} if images else {})}
    return Contents(layers, {**known, **_resize(kind), **about})


def _meta(value: Any, path: Path, option: str) -> dict[str, str]:
    if value is None:
        return {}
    try:
        found = json.loads(str(value))
        return {str(key): str(text) for key, text in found.items() if key not in ("format", "tensors_sha256")}
    except (ValueError, AttributeError) as error:
        raise InputError(option, f"{path}: meta is not JSON of ours ({error})") from None


def _resize(kind: str) -> dict[str, str]:
    return {"resize": IMPLIED_RESIZE[kind]} if kind in IMPLIED_RESIZE else {}


def read_pkl(path: Path, option: str, entry: str | None = None) -> Contents:
    """EDM2's ``{num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}``, read without executing any of it.

    ``entry`` is "fid" or "fd_dinov2", None for the only one or else "fid".
    """
    try:
        with path.open("rb") as file:
            found = load_numbers(file)
    except (OSError, ValueError) as error:
        raise InputError(option, f"{path} cannot be read ({error})") from None
    entries = [key for key in EDM2_ENTRIES if isinstance(found, dict) and isinstance(found.get(key), dict)]
    chosen = entry or (entries[0] if entries else "")
    if chosen not in entries:
        raise InputError(
            option, f"{path} holds {', '.join(entries) or 'none of ' + ', '.join(EDM2_ENTRIES)}; got {chosen or None!r}"
        )
    count = found.get("num_images")
    count = count if isinstance(count, int) and count > 1 else 0
    arrays = found[chosen]
    layers = _from_arrays(path, arrays, count, "EDM2 pkl", option)
    about = {"format": "EDM2 pkl", "entry": chosen, "num_images": str(count), "resize": EDM2_ENTRIES[chosen]}
    return Contents(layers, about)


def entry_for(extractor: str) -> str | None:
    """The entry of an EDM2 pkl that was made with the network of this name; None leaves the choice to the file."""
    known = {"inception": "fid", "dinov2": "fd_dinov2"}
    return next((entry for start, entry in known.items() if extractor.startswith(start)), None)


def read_pt(path: Path, option: str) -> Contents:
    """A cache of torch-fidelity: ``{mu, sigma}``, or features (N, D)."""
    try:
        found = load_torch(str(path))
    except (OSError, ValueError) as error:
        raise InputError(option, f"{path} cannot be read ({error})") from None
    arrays = found if isinstance(found, dict) else {"features": found}
    count = len(arrays["features"]) if "features" in arrays and isinstance(arrays["features"], Tensor) else 0
    layers = _from_arrays(path, arrays, count, "torch-fidelity pt", option)
    return Contents(layers, {"format": "torch-fidelity pt", "num_images": str(count), **_resize("torch-fidelity pt")})


def read_foreign(path: Path, option: str, entry: str | None = None) -> Contents:
    """A reference of another tool, by the file's ending. InputError when it cannot be read or is something else."""
    if path.suffix == ".npz":
        return read_npz(path, option)
    return read_pkl(path, option, entry) if path.suffix == ".pkl" else read_pt(path, option)
