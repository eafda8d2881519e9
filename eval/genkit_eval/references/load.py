"""From a file to the reference that images are compared with: everything that makes the comparison meaningless is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.extractors.combined import stored_name
from genkit_eval.extractors.weights import sha256_of
from genkit_eval.images import Images
from genkit_eval.images.arrays import Arrays
from genkit_eval.metrics import Sample
from genkit_eval.references.build import Work
from genkit_eval.references.contents import MAIN, Contents, Layer
from genkit_eval.references.features import Features
from genkit_eval.references.file import read_safetensors
from genkit_eval.references.foreign import ENDINGS, entry_for, read_foreign

OPTION = "--reference"
# Coverage looks at the fifth neighbour of each image.
MIN_FEATURES = 6
#: Rules that are one: ADM's graph resizes as TensorFlow 1 does.
SAME_RULE = {"adm": "tf1"}
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Reference:
    """Features and moments of real images, with where they come from. ``num_images`` is 0 where the file does not say."""

    sample: Sample
    name: str
    sha256: str
    num_images: int
    dataset: str
    notes: tuple[str, ...] = ()
    resize: str = NOT_RECORDED

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "dataset": self.dataset,
            "num_images": self.num_images or NOT_RECORDED,
            "num_features": len(self.sample),
            "resize": self.resize,
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def rule_of(resize: str) -> str:
    """The name of a resize rule, without what is said about it, and one name for rules that are the same."""
    name = resize.split()[0].rstrip(":,;") if resize.strip() else ""
    return SAME_RULE.get(name, name)


def read_contents(path: Path, option: str = OPTION, entry: str | None = None) -> Contents:
    """What a reference file holds, ours or another tool's; InputError when it is missing, damaged or of no known layout."""
    if not path.is_file():
        raise InputError(option, f"{path} cannot be read: there is no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path, option)
    if path.suffix in ENDINGS:
        return read_foreign(path, option, entry)
    raise InputError(option, f"{path} is none of .safetensors, {', '.join(ENDINGS)}")


def check(path: Path, contents: Contents, extractor: Extractor) -> None:
    """InputError when the reference is of another extractor or resize rule (both are named), or its numbers cannot be used."""
    made, sha = contents.about.get("extractor", "an unknown one"), contents.about.get("extractor_sha256")
    first = extractor.parts.get(extractor.part, extractor)  # a reference of the first network alone serves its metrics
    if sha not in (None, extractor.sha256, first.sha256):
        raise InputError(
            OPTION,
            f"{path} was made with extractor {made} ({str(sha)[:12]}), but {extractor.name} is {extractor.sha256[:12]}; "
            "use one of both",
        )
    theirs, ours = contents.about.get("resize", ""), extractor.resize
    if theirs and rule_of(theirs) != rule_of(ours):
        raise InputError(
            OPTION, f"{path} was made with the resize rule {theirs!r}, and {extractor.name} here uses {ours!r}; use one of both"
        )
    if not all(bool(torch.isfinite(t).all()) for t in contents.tensors()):
        raise InputError(OPTION, f"{path} holds NaN or infinite values")
    if MAIN not in contents.layers:
        raise InputError(OPTION, f"{path} has layers {', '.join(contents.layers)} and no {MAIN}")
    rows = contents.layers[MAIN].features
    if rows is not None and len(rows) < MIN_FEATURES:
        raise InputError(OPTION, f"{path} holds {len(rows)} features; at least {MIN_FEATURES} work")
    for name, layer in contents.layers.items():
        width = extractor.layers.get(name, layer.width)
        if width != layer.width:
            raise InputError(
                OPTION, f"{path}: {name} has {layer.width} columns, and {extractor.name} makes {width}; use one of both"
            )


def with_image_features(path: Path, contents: Contents, extractor: Extractor, work: Work) -> Contents:
    """ADM's npz has the images of its precision and recall and not their features: these are made (or found in the cache)."""
    if contents.about.get("images") != "arr_0" or contents.layers[MAIN].features is not None:
        return contents
    rows = features_of(Images(Arrays(path, OPTION), option=OPTION), extractor, work)
    layers = contents.layers | {MAIN: Layer(contents.layers[MAIN].moments, rows)}
    return dataclasses.replace(contents, layers=layers)


def with_parts(path: Path, contents: Contents, extractor: Extractor) -> Contents:
    """EDM2's pkl has an entry for each network; a combined extractor takes its own. InputError where one is not there."""
    if path.suffix != ".pkl":
        return contents
    layers = dict(contents.layers)
    for name, part in extractor.parts.items():
        entry = entry_for(part.name)
        if name != extractor.part and entry is not None:
            found = read_contents(path, entry=entry)
            check(path, found, part)
            layers |= {stored_name(layer, name): values for layer, values in found.layers.items()}
    return dataclasses.replace(contents, layers=layers)


def features_of(images: Images, extractor: Extractor, work: Work) -> torch.Tensor:
    """The main layer (N, D) of all images."""
    found: Features = work.features(images, extractor)
    return torch.cat([rows.layers[MAIN] for rows in found])


def notes_of(contents: Contents) -> tuple[str, ...]:
    """What a file does not say and a reader must know."""
    found = list(contents.notes)
    if "extractor_sha256" not in contents.about:
        found.append(f"the reference ({contents.about.get('format', 'file')}) does not record the weights it was made with")
    if "resize" not in contents.about:
        found.append("the reference does not record its resize rule")
    return tuple(found)


def to_sample(contents: Contents) -> Sample:
    """What metrics see.

    Where a layer holds the features of all images and these are fewer than columns, its moments are left to be taken from them:
    a distance is then exact, which it is not from a singular covariance.
    """
    features = {name: layer.features for name, layer in contents.layers.items() if layer.features is not None}
    main = features.pop(MAIN, None)
    # Other layers hold other images than the main one where that holds a part of them.
    features = {name: rows for name, rows in features.items() if main is None or len(rows) == len(main)}
    moments = {}
    for name, layer in contents.layers.items():
        rows = main if name == MAIN else features.get(name)
        complete = rows is not None and len(rows) == contents.num_images <= layer.width and rows.dtype == torch.float32
        if layer.moments is not None and not complete:
            moments[name] = layer.moments
    return Sample(main, moments=moments.pop(MAIN, None), layers=features, layer_moments=moments)


def load_reference(
    path: Path | None, extractor: Extractor, work: Work | None = None, sha256: str | None = None, entry: str | None = None
) -> Reference:
    """Read a reference of ours (.safetensors) or of another tool (.npz, .pkl, .pt); None is the extractor's own.

    Args:
        path: the file.
        extractor: the network that the images will go through.
        work: how features of images inside the file (``arr_0`` of ADM) are made.
        sha256: hash that the file must have, default any.
        entry: of an EDM2 pkl, "fid" or "fd_dinov2"; default by the extractor's name.

    Raises:
        InputError: the file is missing, damaged, not finite, too small, has another hash, or was made with another extractor or
            resize rule.
    """
    path = path or extractor.reference
    if path is None:
        raise InputError(OPTION, f"extractor {extractor.name} has no reference of its own; give a file made with it")
    contents = read_contents(path, entry=entry or entry_for(extractor.name))
    digest = sha256_of(path)
    if sha256 is not None and digest != sha256:
        raise InputError(OPTION, f"{path} has SHA-256 {digest} and not {sha256}: it is another file than the one asked for")
    check(path, contents, extractor)
    contents = with_parts(path, contents, extractor)
    contents = with_image_features(path, contents, extractor, work or Work())
    name = extractor.name if path == extractor.reference else str(path)
    dataset = contents.about.get("dataset", "unknown")
    resize = contents.about.get("resize", NOT_RECORDED)
    return Reference(to_sample(contents), name, digest, contents.num_images, dataset, notes_of(contents), resize)
