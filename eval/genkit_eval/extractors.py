"""Networks whose features the metrics compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from genkit_eval.errors import InputError


@dataclass(frozen=True)
class Extractor:
    """A feature network and what a number made with it must say.

    ``label`` goes into metric titles (``FD-<label>``); "FID" is kept for the 2015 Inception network and never appears here.
    ``features`` maps uint8 (B, 3, H, W) to float32 (B, D). ``resize`` is the rule by which images reach the network's size;
    ``image_shape`` is the one (3, H, W) that it takes, None for any.
    """

    name: str
    label: str
    sha256: str
    resize: str
    features: Callable[[Tensor], Tensor] = field(compare=False, repr=False)
    reference: Path | None = None
    image_shape: tuple[int, int, int] | None = None

    def __call__(self, pixels: Tensor, batch: int = 256) -> Tensor:
        """Features (N, D) float32 on the CPU, without gradients."""
        with torch.no_grad():
            parts = [self.features(part).float().cpu() for part in pixels.split(batch)]
        return torch.cat(parts)


def _builtin_cifar10(device: str) -> Extractor:
    import genkit.models.classifier as classifier

    net = classifier.load_builtin()
    assert isinstance(net, nn.Module)
    net.eval().to(device)
    reference = Path(classifier.__file__).parents[1] / "assets" / "cifar10" / "reference.safetensors"
    shape = (net.config.image_channels, net.config.image_size, net.config.image_size)
    resize = "none (32x32 as generated)"
    return Extractor("builtin/cifar10", "CIFAR10", str(net.fingerprint), resize, net.features, reference, shape)


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {"builtin/cifar10": _builtin_cifar10}


def load_extractor(name: str, device: str = "cpu") -> Extractor:
    """The extractor ``name`` of ``EXTRACTORS``; InputError for an unknown name or weights that cannot be read."""
    if name not in EXTRACTORS:
        raise InputError("--extractor", f"got {name!r}; one of {', '.join(sorted(EXTRACTORS))} works")
    try:
        return EXTRACTORS[name](device)
    except (OSError, ValueError) as error:
        raise InputError("--extractor", f"{name}: {error}") from None
