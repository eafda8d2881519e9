"""A reference out of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.images import Images
from genkit_eval.metrics.registry import PIXEL_LAYER
from genkit_eval.references.contents import MAIN, Contents, Layer, StreamingMoments
from genkit_eval.references.features import Features
from genkit_eval.references.file import rows_to_keep

#: Images whose features are stored for precision and recall: as many as the reference of ADM has.
NUM_FEATURES = 10_000


@dataclass(frozen=True)
class Work:
    """How features are made: cache folder (None keeps none), images per batch, decoding threads, progress, pinned batches.

    With ``spread``, all processes of the command make a share of them; each must ask for the same ones in the same order.
    """

    cache: Path | None = None
    batch: int = 64
    workers: int | None = None
    advance: Callable[[int], object] = lambda n: None
    pin: bool = False
    spread: bool = False

    def features(self, images: Images, extractor: Extractor) -> Features:
        """Features of ``images``, block by block."""
        found = Features(images, extractor, self.cache, self.batch, self.workers, self.advance, self.pin)
        if self.spread:
            found.spread()
        return found


def sample_of(total: int, count: int, seed: int = 0) -> list[int]:
    """``count`` of ``range(total)``, drawn without replacement, in order."""
    chosen: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    return chosen


def build(
    images: Images,
    extractor: Extractor,
    work: Work | None = None,
    num_features: int = NUM_FEATURES,
    keep_images: int = 0,
    dataset: str | None = None,
) -> Contents:
    """Mean and covariance of every layer over all images, in float64 and one pass, and the features of a sample of them.

    Args:
        images: of the reference.
        extractor: the network.
        work: cache, batch, threads and progress.
        num_features: rows of features that are stored, for metrics that look at neighbours; a random sample, seed 0.
        keep_images: pixels of so many of these images are stored too, as ADM's evaluator wants them; they must be of one size.
        dataset: what the images are, for the results; default their place.

    Raises:
        InputError: fewer than two readable images, more unreadable ones than allowed, features that are not finite.
    """
    chosen = sample_of(len(images), num_features)
    pixels = pixels_of(images, sample_of(len(images), keep_images)) if keep_images else None
    features = (work or Work()).features(images, extractor)
    moments: dict[str, StreamingMoments] = {}
    kept: dict[str, list[Tensor]] = {}
    wanted, widths = set(chosen), dict[str, int]()
    for rows in features:
        layers = {name: values for name, values in rows.layers.items() if not name.startswith(PIXEL_LAYER)}
        widths = {name: int(values.shape[1]) for name, values in layers.items()} or widths
        mask = torch.tensor([position in wanted for position in rows.positions], dtype=torch.bool)
        for name, values in layers.items():
            moments.setdefault(name, StreamingMoments()).add(values)
            if name in rows_to_keep(layers, widths, len(images), {MAIN, *extractor.parts}):
                kept.setdefault(name, []).append(values[mask])
    found = moments[MAIN].moments().n if MAIN in moments else 0
    if found < 2:
        raise InputError(images.option, f"{images.uri} has {found} readable images; a reference needs at least 2")
    layers_done = {name: Layer(sums.moments(), torch.cat(kept[name]) if name in kept else None) for name, sums in moments.items()}
    about = describe(images, extractor, found, len(torch.cat(kept[MAIN])), widths, dataset)
    return Contents(layers_done, about, pixels, tuple(features.problems.lines()))


def describe(
    images: Images, extractor: Extractor, count: int, rows: int, widths: dict[str, int], dataset: str | None
) -> dict[str, str]:
    """What the file says beside its numbers. No dates: equal images and networks give an equal file."""
    return {
        "num_images": str(count),
        "extractor": extractor.name,
        "extractor_label": extractor.label,
        "extractor_sha256": extractor.sha256,
        "resize": extractor.resize,
        "dataset": dataset or images.uri,
        "dataset_sha256": images.fingerprint,
        "crop": images.view.crop,
        "size": str(images.view.size or "as stored"),
        "features_of": "all images" if rows == count else f"{rows} images drawn with seed 0",
        "layers": json.dumps(widths, sort_keys=True),
        "decoder": f"Pillow {PIL.__version__}",
        "unreadable": str(len(images) - count),
    }


def pixels_of(images: Images, positions: list[int]) -> Tensor:
    """uint8 (K, H, W, 3) of the images at ``positions``; InputError when they are not of one size."""
    parts = [pixels for batch in images.batches(64, positions) for pixels in batch.pixels]
    if len({tuple(part.shape) for part in parts}) != 1:
        raise InputError("--keep-images", f"the images of {images.uri} differ in size; --size brings them to one")
    return torch.stack(parts).permute(0, 2, 3, 1).contiguous()
