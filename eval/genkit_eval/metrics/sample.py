"""A set of images as the metrics see it, and the pair (reference, generated) that a metric compares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from genkit_eval.extractors.combined import own_name
from genkit_eval.metrics.moments import Moments, moments_of

T = TypeVar("T")
MAIN = "features"


class _Cached:
    """Values that several metrics need and that are computed once."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value stored under ``key``, computing it on the first call."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value


def checked(name: str, x: Tensor) -> Tensor:
    """``x`` as float32 or float64, without a copy where it is one already; ValueError unless a finite matrix (N >= 2, D)."""
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; a matrix (N, D) with N >= 2 works")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    bad = sum(int((~torch.isfinite(part)).any(dim=1).sum()) for part in x.split(256))
    if bad:
        raise ValueError(f"{name}: {bad} of {x.shape[0]} rows hold NaN or infinite values")
    return x


class Sample(_Cached):
    """Features of N images in one or more layers (N, D) and, where known, their uint8 pixels (N, 3, H, W) and labels (N,).

    ``features`` is the main layer, ``layers`` holds others ("spatial", "logits", "clip", ...) with the same images in the same
    order; float32 stays float32, and each metric converts what it has in hand. ``moments`` (of the main layer) and
    ``layer_moments`` replace mean and covariance when they were taken over more images than are held here (a reference keeps
    statistics of a whole training set beside the features of a part of it, or none of them: ``features`` None).
    Raises ValueError for layers that are not finite matrices of one length, and for pixels that are not uint8 (N, 3, H, W).
    """

    def __init__(
        self,
        features: Tensor | None,
        pixels: Tensor | None = None,
        moments: Moments | None = None,
        *,
        layers: Mapping[str, Tensor] | None = None,
        layer_moments: Mapping[str, Moments] | None = None,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        if pixels is not None and (pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3):
            raise ValueError(f"pixels: got {pixels.dtype} {tuple(pixels.shape)}; uint8 (N, 3, H, W) works")
        given = {**({} if features is None else {MAIN: features}), **(layers or {})}
        self.layers = {name: checked(name, x) for name, x in given.items()}
        self.pixels, self.labels = pixels, labels
        self._moments = {**({} if moments is None else {MAIN: moments}), **(layer_moments or {})}
        counts = {name: len(x) for name, x in self.layers.items()}
        counts |= {name: len(x) for name, x in (("pixels", pixels), ("labels", labels)) if x is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"layers: got {', '.join(f'{n} of {name}' for name, n in counts.items())}; one count works")
        self._count = next(iter(counts.values()), 0)

    def __len__(self) -> int:
        return self._count

    @property
    def features(self) -> Tensor:
        """The main layer (N, D); ValueError where only moments are known."""
        if MAIN not in self.layers:
            raise ValueError("features: this set has none of each image, only what was taken over all of them")
        return self.layers[MAIN]

    def layer(self, name: str) -> Sample:
        """The same images with layer ``name`` as their main one; ValueError where there is none."""
        if name == MAIN:
            return self
        return self.once(("layer", name), lambda: self._layer(name))

    def _layer(self, name: str) -> Sample:
        if name not in self.layers and name not in self._moments:
            raise ValueError(f"layer: got {name!r}; this set has {', '.join({**self.layers, **self._moments}) or 'none'}")
        return Sample(self.layers.get(name), self.pixels, self._moments.get(name), labels=self.labels)

    def also(self, name: str) -> Sample:
        """The same images, whose main layer goes by ``name`` too; metrics of one kind of features ask for them by a name."""
        if not name or name in self.layers:
            return self
        other = copy.copy(self)
        other.layers = self.layers | ({name: self.layers[MAIN]} if MAIN in self.layers else {})
        other._moments = self._moments | ({name: self._moments[MAIN]} if MAIN in self._moments else {})
        return other

    def part(self, name: str) -> Sample:
        """The same images as one part of a combined extractor sees them: its layers alone, under their own names."""
        return self.once(("part", name), lambda: self._part(name))

    def _part(self, name: str) -> Sample:
        layers = {own: x for key, x in self.layers.items() if (own := own_name(key, name))}
        moments = {own: x for key, x in self._moments.items() if (own := own_name(key, name))}
        features, main = layers.pop(MAIN, None), moments.pop(MAIN, None)
        return Sample(features, self.pixels, main, layers=layers, layer_moments=moments, labels=self.labels)

    def has_moments(self, layer: str = MAIN) -> bool:
        """Whether mean and covariance of ``layer`` are known or can be taken."""
        return layer in self._moments or layer in self.layers

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the main layer: those given, else those of ``features``."""
        if MAIN in self._moments:
            return self._moments[MAIN]
        return self.once("moments", lambda: moments_of(self.features))

    @property
    def owns_moments(self) -> bool:
        """Whether the moments are those of the features held here."""
        return MAIN not in self._moments

    @property
    def width(self) -> int | None:
        """Columns of the main layer; None where nothing is known of it."""
        if MAIN in self.layers:
            return int(self.layers[MAIN].shape[1])
        return int(self._moments[MAIN].mean.shape[0]) if MAIN in self._moments else None


class Pair(_Cached):
    """A reference (``real``) and a generated set (``fake``) with layers of the same widths; ``train``: the training images."""

    def __init__(self, real: Sample, fake: Sample, train: Sample | None = None) -> None:
        super().__init__()
        self.real, self.fake, self.train = real, fake, train
        for name, sample in (("reference", real), ("training set", train)):
            if sample is None or None in (sample.width, fake.width) or sample.width == fake.width:
                continue
            raise ValueError(
                f"features: the {name} has {sample.width} columns and the generated set {fake.width}; "
                "both must come from one extractor"
            )

    def of(self, layer: str) -> Pair:
        """The pair with ``layer`` as the main one; values found for it are kept."""
        if layer == MAIN:
            return self
        return self.once(("layer", layer), lambda: self._of(layer))

    def part(self, name: str) -> Pair:
        """The pair as one part of a combined extractor sees it; values found for it are kept."""
        train = None if self.train is None else self.train.part(name)
        return self.once(("part", name), lambda: Pair(self.real.part(name), self.fake.part(name), train))

    def _of(self, layer: str) -> Pair:
        train = self.train.layer(layer) if self.train is not None and layer in self.train.layers else None
        return Pair(self.real.layer(layer), self.fake.layer(layer), train)
