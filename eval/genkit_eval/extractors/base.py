"""What every extractor is: a network, and what a number made with it must say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from genkit_eval.errors import InputError

#: The layer that metrics read unless they name another.
MAIN = "features"


@dataclass(frozen=True)
class Options:
    """How a network is asked for: the device, a weights file and a resize rule in place of its own.

    ``any_weights``: a weights file with another hash than the published one is taken, under another name.
    """

    device: str = "cpu"
    weights: Path | None = None
    resize: str | None = None
    any_weights: bool = False

    def only_device(self, name: str) -> None:
        """InputError when weights or a resize rule are given to a network that has one of each."""
        for option, value in (("--weights", self.weights), ("--resize", self.resize)):
            if value is not None:
                raise InputError(option, f"got {value}; extractor {name} has its own, leave it out")

    def rule(self, name: str, known: Mapping[str, str]) -> str:
        """The resize rule: as asked, else the first of ``known``. InputError for one the network was never used with."""
        chosen = {None: next(iter(known)), "adm": "tf1"}.get(self.resize, self.resize)
        if chosen not in known:
            raise InputError("--resize", f"got {self.resize!r}; extractor {name} takes {', '.join(known)}")
        return str(chosen)


@dataclass(frozen=True)
class Extractor:
    """A feature network and what a number made with it must say.

    ``label`` goes into metric titles. ``fid`` is what its Frechet distance is called where that is ``FID``, "" where it is
    ``FD-<label>``: the published Inception of 2015 alone gives FID. ``sha256`` is that of the weights.
    ``features`` maps uint8 (B, 3, H, W) to float32 (B, D), or to one such matrix for each layer, the main one under "features".
    ``resize`` is the rule by which images reach the network's size; ``image_shape`` is the one (3, H, W) that it takes, None for
    any. ``layers`` are the widths of the layers, where known. ``variant`` names network and resize rule in the name of a number:
    ``adm-tf1``, ``clean``, ``dinov2-vit-l-14-edm2``. ``batch`` images go through the network at once. ``texts``, where the
    network reads text as well, maps N texts to (N, D) in the space of the features. ``part`` is what its layers are called beside
    those of others in one pass, and ``parts`` are all of these by that name, the first one being itself; empty for one network.
    """

    name: str
    label: str
    sha256: str
    resize: str
    features: Callable[[Tensor], Tensor | Mapping[str, Tensor]] = field(compare=False, repr=False)
    reference: Path | None = None
    image_shape: tuple[int, int, int] | None = None
    layers: Mapping[str, int] = field(default_factory=dict, compare=False)
    variant: str = ""
    fid: str = ""
    part: str = ""
    parts: Mapping[str, Extractor] = field(default_factory=dict, compare=False)
    device: str = "cpu"
    batch: int = 256
    texts: Callable[[Sequence[str]], Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.variant:
            object.__setattr__(self, "variant", self.name)
        if not self.part:
            object.__setattr__(self, "part", re.sub(r"[^A-Za-z0-9_-]+", "-", self.name.partition("@")[0].rpartition("/")[2]))

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Layers by name, each (N, D) float32 on the CPU, without gradients, of N >= 1 images.

        Raises ValueError for pixels that are not uint8 (N, 3, H, W), and of another shape than ``image_shape``.
        """
        shape = tuple(pixels.shape)
        if pixels.dtype != torch.uint8 or len(shape) != 4 or shape[0] < 1 or shape[1] != 3:
            raise ValueError(f"pixels: got {pixels.dtype} {shape}; uint8 (N, 3, H, W) works")
        if self.image_shape is not None and shape[1:] != self.image_shape:
            raise ValueError(f"pixels: got images of {shape[1:]}; extractor {self.name} takes {self.image_shape}")
        parts: dict[str, list[Tensor]] = {}
        with torch.inference_mode(), _full_precision(self.device):
            for batch in pixels.split(self.batch):
                found = self.features(batch.to(self.device, non_blocking=batch.is_pinned()))
                for layer, values in (found if isinstance(found, Mapping) else {MAIN: found}).items():
                    parts.setdefault(layer, []).append(values.float().cpu())
        # Joined outside, so that what comes back is not bound to inference mode.
        return {layer: torch.cat(values) for layer, values in parts.items()}

    @property
    def frechet(self) -> str:
        """What a Frechet distance over the features is called."""
        return self.fid or f"FD-{self.label}"

    def as_dict(self) -> dict[str, object]:
        """For the results file."""
        keys = ("name", "label", "sha256", "resize", "variant")
        parts = {"parts": {name: part.as_dict() for name, part in self.parts.items()}} if self.parts else {}
        return {**{key: getattr(self, key) for key in keys}, "layers": dict(self.layers), **parts}


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """TF32 off: on a GPU it is cuDNN's default, and moves features in the third digit."""
    if not device.startswith("cuda"):
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        yield
