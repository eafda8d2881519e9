"""What a trained classifier becomes: a half-precision weights file and the reference statistics of the training set."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from genkit.models.classifier import FORMAT, Classifier, load_classifier

DATASET = "CIFAR-10 (JPEG copy)"


@torch.no_grad()
def over_batches(function: Callable[[Tensor], Tensor], images: Tensor, batch: int = 500) -> Tensor:
    """``function`` over ``images`` in batches, joined."""
    return torch.cat([function(part).cpu() for part in tqdm(torch.split(images, batch), desc="classify", leave=False)])


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of ``images`` (B, C, H, W) uint8 given their label: by one pass, and by ``logits`` (with the mirror image)."""
    once = over_batches(lambda part: net(net.pixels(part)), images)
    both = over_batches(net.logits, images)
    return tuple(float((scores.argmax(1) == labels).double().mean()) for scores in (once, both))  # type: ignore[return-value]


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of ``features`` (N, D), in float64."""
    f = features.double()
    mean = f.mean(0)
    centred = f - mean
    return mean, centred.T @ centred / (len(f) - 1)


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` images of every class: class 0 first, in file order within a class.

    Raises:
        ValueError: a class has fewer than ``count`` images.
    """
    parts = [torch.nonzero(labels == c).flatten() for c in range(int(labels.max()) + 1)]
    short = [c for c, part in enumerate(parts) if len(part) < count]
    if short:
        raise ValueError(f"count={count} is more than classes {short} hold; use at most {min(map(len, parts))}")
    return torch.cat([part[:count] for part in parts])


def export(
    net: Classifier,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    folder: Path,
    about: dict[str, str],
    per_class: int = 1000,
) -> None:
    """Write ``classifier.safetensors`` (half precision) and ``reference.safetensors`` into ``folder``.

    The recorded accuracy is that of the rounded weights. The reference holds ``mean`` and ``cov`` (float64) over every
    training image, and ``features`` (float16) of the first ``per_class`` images of each class, sorted by class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half().cpu().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    rounded = copy.deepcopy(net).eval()
    rounded.load_state_dict({k: v.float() for k, v in half.items()}, strict=False)
    plain, flipped = accuracy(rounded, *test)
    metadata = {"format": FORMAT, "config": json.dumps(asdict(net.config)), "dataset": DATASET}
    metadata |= {"test_accuracy": f"{plain:.4f}", "test_accuracy_flip": f"{flipped:.4f}", "test_images": str(len(test[0]))}
    save_file(half, folder / "classifier.safetensors", metadata | about)
    extractor = load_classifier(folder / "classifier.safetensors")
    images, labels = train
    features = over_batches(extractor.features, images)
    mean, cov = statistics(features)
    kept = first_of_each(labels, per_class)
    tensors = {"mean": mean, "cov": cov, "features": features[kept].half()}
    save_file(tensors, folder / "reference.safetensors", _reference_metadata(len(images), per_class, extractor.fingerprint))
    print(f"test accuracy of the exported file {plain:.2%} ({flipped:.2%} averaged over flips); sha256 {extractor.fingerprint}")


def _reference_metadata(num_images: int, per_class: int, fingerprint: str) -> dict[str, str]:
    metadata = {"num_images": str(num_images), "extractor": "builtin/cifar10-classifier", "extractor_sha256": fingerprint}
    metadata |= {"resize": "none", "dataset": f"{DATASET}, training split", "cov_ddof": "1"}
    return metadata | {"features_of": f"the first {per_class} images of each class, sorted by class"}
