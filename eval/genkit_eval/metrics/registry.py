"""The table of metrics: one ``Spec`` each, used alike by the command, the report and the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from genkit_eval.extractors.base import Extractor
from genkit_eval.extractors.combined import stored_name
from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.sample import Pair


@dataclass(frozen=True)
class Spec:
    """What a metric is called, which protocol it follows, and how it is computed.

    ``title`` may hold ``{extractor}``, the extractor's label, and ``{fd}``, what a Frechet distance over it is called.
    ``variant`` begins the name of the protocol, see :meth:`protocol`; it may hold ``{fd}``, ``{n_real}`` and ``{n_fake}``.
    ``value(pair)`` is the number; ``replicates(pair, counts)`` is (B,) numbers, one for each resample, and equals ``value`` when
    every image is counted once. ``interval_of`` says in words what the bootstrap resamples or the jackknife leaves out. ``ideal``
    is the value for two identical sets, None where there is none.

    ``layer`` is the feature layer it reads and ``beside`` a second one of the generated images. ``reference`` says what it needs
    of the reference: ``features``, ``moments`` (mean and covariance alone, so the count that belongs to the number is that of the
    images behind them), ``train`` (features of the training images) or ``none``. ``least`` is the fewest generated images.
    ``standard``: computed in every run; others when asked for by name. ``over`` is the variant of the extractor that the protocol
    itself prescribes, so that its name need not be said.
    """

    name: str
    title: str
    variant: str
    better: Literal["lower", "higher", "neither"]
    source: Literal["features", "pixels"]
    value: Callable[[Pair], float]
    replicates: Callable[[Pair, Counts], Tensor]
    interval_of: str
    ideal: float | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    layer: str = "features"
    beside: str | None = None
    reference: Literal["features", "moments", "train", "none"] = "features"
    least: int = 2
    standard: bool = True
    over: str = ""

    @property
    def over_moments(self) -> bool:
        """Whether the reference enters by its stored mean and covariance alone."""
        return self.reference == "moments"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Layers of the generated images that it reads; none where it reads pixels."""
        layers = (self.layer,) if self.beside is None else (self.layer, self.beside)
        return () if self.source == "pixels" else layers

    def over_part(self, part: str) -> Spec:
        """The metric over the features of one part of a combined extractor."""
        return replace(
            self,
            name=f"{self.name}@{part}",
            title=self.title if "{" in self.title else f"{self.title} ({{extractor}})",
            value=lambda pair: self.value(pair.part(part)),
            replicates=lambda pair, counts: self.replicates(pair.part(part), counts),
            layer=stored_name(self.layer, part),
            beside=None if self.beside is None else stored_name(self.beside, part),
        )

    def heading(self, extractor: Extractor) -> str:
        """Title of a number over this extractor: ``FID``, ``FD-DINOv2``, ``KID-Inception``."""
        return self.title.format(extractor=extractor.label, fd=extractor.frechet)

    def protocol(self, extractor: Extractor, n_real: int, n_fake: int) -> str:
        """The whole protocol of a number in one name; numbers of two protocols never share one.

        The metric, its rule, counts of images where these belong to it (``10k`` for 10,000), and last the extractor with its
        resize rule: ``fid/adm-tf1``, ``fd/dinov2-vit-l-14-edm2``, ``pr/exact/k3/clean``. Without an extractor where the metric
        reads pixels or prescribes it itself (``pr/adm-fp16/k3/10k-50k``).
        """
        real, fake = (f"{n // 1000}k" if n and n % 1000 == 0 else str(n) for n in (n_real, n_fake))
        kind = "fid" if extractor.fid else "fd"
        name = self.variant.format(fd=kind, n_real=real, n_fake=fake)
        return name if self.source == "pixels" or extractor.variant == self.over else f"{name}/{extractor.variant}"


METRICS: dict[str, Spec] = {}
#: Begins the names of layers (N, 1) with the numbers that pixel metrics would take from pixels, where these are not at hand.
PIXEL_LAYER = "pixels."


def register(spec: Spec) -> Spec:
    """Add a metric to the table; ValueError when the name is taken by another protocol."""
    known = METRICS.get(spec.name)
    if known is not None and known.variant != spec.variant:
        raise ValueError(
            f"metric {spec.name!r} is already registered as {known.variant!r}; choose another name than for {spec.variant!r}"
        )
    METRICS[spec.name] = spec
    return spec


def unavailable(spec: Spec, pair: Pair) -> str | None:
    """Why ``spec`` cannot be computed for ``pair``; None where it can."""
    fake, real = pair.fake, pair.real
    if spec.source == "pixels":
        known = fake.pixels is not None or PIXEL_LAYER + spec.name in fake.layers
        return None if known else "needs the pixels of the generated images"
    missing = [layer for layer in spec.inputs if layer not in fake.layers]
    if missing:
        return f"needs layer {', '.join(missing)} of the generated images, which hold {', '.join(fake.layers) or 'none'}"
    if len(fake) < spec.least:
        return f"needs at least {spec.least:,} generated images, not {len(fake):,}"
    if spec.reference == "train" and (pair.train is None or spec.layer not in pair.train.layers):
        return f"needs layer {spec.layer} of the training images"
    if spec.reference == "moments" and not real.has_moments(spec.layer):
        return f"needs mean and covariance of layer {spec.layer} of the reference"
    if spec.reference == "features" and spec.layer not in real.layers:
        held = "only mean and covariance of it" if real.has_moments(spec.layer) else f"only {', '.join(real.layers) or 'moments'}"
        return f"needs layer {spec.layer} of each reference image; the reference holds {held}"
    if spec.reference == "features" and len(real) < spec.least:
        return f"needs at least {spec.least:,} reference images, not {len(real):,}"
    return None
