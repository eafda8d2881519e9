"""Several networks in one pass: each layer is stored under its own name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.extractors.base import MAIN, Extractor


def stored_name(layer: str, part: str) -> str:
    """What ``layer`` of a part is called beside those of the others: ``dinov2``, ``dinov2.logits``."""
    return part if layer == MAIN else f"{part}.{layer}"


def own_name(stored: str, part: str) -> str:
    """The reverse of :func:`stored_name`; "" for a layer of another part."""
    return MAIN if stored == part else stored.removeprefix(f"{part}.") if stored.startswith(f"{part}.") else ""


def combine(extractors: Sequence[Extractor]) -> Extractor:
    """All of ``extractors`` as one. The first gives layers, label and variant; those of the others go by their ``part``.

    Raises InputError for two of one part, and for two that take images of different sizes.
    """
    first, *others = extractors
    parts = {extractor.part: extractor for extractor in others}
    if len({first.part, *parts}) < len(extractors):
        raise InputError(
            "--extractor", f"{' and '.join(e.name for e in extractors)} are of one kind; run them one after the other"
        )
    shapes = {extractor.image_shape for extractor in extractors} - {None}
    if len(shapes) > 1:
        raise InputError("--extractor", f"{' and '.join(e.name for e in extractors)} take images of different sizes")
    identity = json.dumps([[extractor.sha256, extractor.resize] for extractor in extractors])

    def features(pixels: Tensor) -> dict[str, Tensor]:
        found = first(pixels)
        for name, extractor in parts.items():
            found |= {stored_name(layer, name): values for layer, values in extractor(pixels).items()}
        return found

    more = {stored_name(layer, name): width for name, e in parts.items() for layer, width in e.layers.items()}
    return Extractor(
        name="+".join(extractor.name for extractor in extractors),
        label=first.label,
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        resize="; ".join([first.resize, *(f"{name}: {extractor.resize}" for name, extractor in parts.items())]),
        features=features,
        reference=first.reference,
        image_shape=next(iter(shapes), None),
        layers={**first.layers, **more},
        variant=first.variant,
        # Each takes its images where it wants them, in batches of its own.
        device="cpu",
        batch=max(extractor.batch for extractor in extractors),
        fid=first.fid,
        part=first.part,
        parts={first.part: first, **parts},
    )
