"""Reference statistics: what generated images are compared with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import Sample
from genkit_eval.metrics.moments import Moments

# Coverage looks at the fifth neighbour of each image.
MIN_FEATURES = 6


@dataclass(frozen=True)
class Reference:
    """Features and moments of real images, with where they come from."""

    sample: Sample
    name: str
    sha256: str
    num_images: int
    dataset: str

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "dataset": self.dataset,
            "num_images": self.num_images,
            "num_features": len(self.sample),
        }


def load_reference(path: Path | None, extractor: Extractor) -> Reference:
    """Read ``mean`` (D,), ``cov`` (D, D), ``features`` (M, D) and metadata from a safetensors file; None is the extractor's own.

    Raises InputError when the file is missing, damaged, not finite, too small, or was made with another extractor.
    """
    option, path = "--reference", path or extractor.reference
    if path is None:
        raise InputError(option, f"extractor {extractor.name} has no reference of its own; give a file made with it")
    try:
        raw = path.read_bytes()
        tensors = load(raw)
        with safe_open(path, "pt") as handle:
            metadata: dict[str, str] = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(option, f"{path} cannot be read as safetensors ({error})") from None
    _check(path, tensors, metadata, extractor)
    count = _count(path, metadata["num_images"])
    moments = Moments.from_cov(count, tensors["mean"], tensors["cov"])
    name = extractor.name if path == extractor.reference else str(path)
    sample = Sample(tensors["features"], moments=moments)
    return Reference(sample, name, hashlib.sha256(raw).hexdigest(), count, metadata.get("dataset", "unknown"))


def _count(path: Path, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 2:
        raise InputError("--reference", f"{path} says num_images is {text!r}; a whole number from 2 on works")
    return int(text)


def _check(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], extractor: Extractor) -> None:
    option = "--reference"
    missing = [key for key in ("mean", "cov", "features") if key not in tensors]
    missing += [key for key in ("num_images", "extractor_sha256") if key not in metadata]
    if missing:
        raise InputError(option, f"{path} lacks {', '.join(missing)}")
    if metadata["extractor_sha256"] != extractor.sha256:
        made = metadata["extractor_sha256"][:12]
        raise InputError(
            option, f"{path} was made with extractor {made}, but {extractor.name} is {extractor.sha256[:12]}; use one of both"
        )
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise InputError(option, f"{path} holds NaN or infinite values")
    if tensors["mean"].ndim != 1 or tensors["features"].ndim != 2:
        got = f"mean {tuple(tensors['mean'].shape)} and features {tuple(tensors['features'].shape)}"
        raise InputError(option, f"{path}: got {got}; mean (D,) and features (M, D) work")
    if len(tensors["features"]) < MIN_FEATURES:
        raise InputError(option, f"{path} holds {len(tensors['features'])} features; at least {MIN_FEATURES} work")
    width = tensors["mean"].shape[0]
    if tensors["cov"].shape != (width, width) or tensors["features"].shape[1:] != (width,):
        raise InputError(option, f"{path}: mean, cov and features do not agree on the number of columns ({width})")
