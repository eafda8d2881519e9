"""What ``genkit-eval reference build | convert | show`` do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from genkit_eval.commands.work import Looking, Network
from genkit_eval.distributed import world
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.extractors.weights import sha256_of
from genkit_eval.files import check_writable
from genkit_eval.images import Images
from genkit_eval.images.arrays import Arrays
from genkit_eval.references import Contents, build, read_contents, write_npz, write_safetensors
from genkit_eval.references.build import NUM_FEATURES, pixels_of, sample_of
from genkit_eval.references.contents import Layer
from genkit_eval.references.foreign import entry_for
from genkit_eval.references.load import check, notes_of, with_image_features

WRITERS = {".safetensors": write_safetensors, ".npz": write_npz}


def check_out(path: Path) -> None:
    """InputError for an ending that is not written, and for a folder that cannot be written in."""
    if path.suffix not in WRITERS:
        raise InputError("--out", f"got {path}; a name that ends in .safetensors, or .npz for ADM's evaluator, works")
    check_writable(path.parent)


def write(path: Path, contents: Contents) -> None:
    """Write in the layout that the ending asks for, and say what was written."""
    WRITERS[path.suffix](path, contents)
    for note in contents.notes:
        print(f"note: {note}")
    if path.suffix == ".npz" and contents.pixels is None:
        print("note: without images (--keep-images) ADM's own evaluator computes no precision and recall from this file")
    print(f"reference: {path} (SHA-256 {sha256_of(path)[:12]})")


def run_build(
    source: str,
    out: Path,
    network: Network,
    looking: Looking,
    num_features: int = NUM_FEATURES,
    keep_images: int = 0,
    dataset: str | None = None,
) -> None:
    """Statistics of images into a file, by all processes of the command.

    Raises InputError for whatever does not work, before the images are gone through.
    """
    check_out(out)
    for option, value, least in (("--num-features", num_features, 6), ("--keep-images", keep_images, 0)):
        if value < least:
            raise InputError(option, f"got {value}; {least} or more works")
    images = looking.open(source, "SOURCE")
    with world().ahead():
        extractor = network.load()
    with looking.work(network.device, len(images), "features", spread=True) as work:
        if not world().first:
            work.features(images, extractor)
            return
        contents = build(images, extractor, work, num_features, keep_images, dataset)
    write(out, contents)


def stamp(contents: Contents, extractor: Extractor) -> Contents:
    """``contents`` with the extractor that the user says it was made with, and its resize rule where the file has none."""
    own = {"extractor": extractor.name, "extractor_label": extractor.label, "extractor_sha256": extractor.sha256}
    notes = tuple(note for note in notes_of(contents) if "resize" not in note and "weights" not in note)
    origin = {} if "extractor_sha256" in contents.about else {"extractor_said_by": "whoever converted the file"}
    known = {key: value for key, value in contents.about.items() if key not in ("images", "entry")}
    return dataclasses.replace(contents, about={"resize": extractor.resize, **own, **origin, **known}, notes=notes)


@dataclasses.dataclass(frozen=True)
class Said:
    """What the user knows of a file that does not say it: images behind the moments, name of the data; which entry, how many
    of its images to keep."""

    num_images: int | None = None
    dataset: str | None = None
    entry: str | None = None
    keep_images: int = 0

    def amend(self, path: Path, contents: Contents) -> Contents:
        """``contents`` with it. InputError where the file says something else."""
        about = dict(contents.about)
        known = contents.num_images
        if self.num_images is not None:
            if self.num_images < 2 or known not in (0, self.num_images):
                raise InputError("--num-images", f"got {self.num_images}; {path} says {known or 'nothing, 2 or more works'}")
            about["num_images"] = str(self.num_images)
        about["dataset"] = self.dataset or about.get("dataset") or path.name
        pixels = contents.pixels
        if self.keep_images and about.get("images") == "arr_0":
            images = Images(Arrays(path, "IN"), option="IN")
            pixels = pixels_of(images, sample_of(len(images), self.keep_images))
        return dataclasses.replace(contents, about=about, pixels=pixels)


def run_convert(source: Path, out: Path, network: Network | None, looking: Looking, said: Said) -> Contents:
    """A reference of another tool into ours, or ours into ADM's npz.

    Into ``.safetensors`` an extractor must be named, as other tools do not write down which weights they used.
    """
    check_out(out)
    contents = read_contents(source, "IN", said.entry or entry_for(network.name if network else ""))
    recorded = "extractor_sha256" in contents.about
    if out.suffix == ".safetensors" and network is None and not recorded:
        raise InputError("--extractor", f"{source} does not say which weights it was made with; name the extractor it is for")
    contents = said.amend(source, contents)
    if network is not None:
        extractor = network.load()
        check(source, contents, extractor)
        with looking.work(network.device, 0, "features of arr_0") as work:
            contents = stamp(with_image_features(source, contents, extractor, work), extractor)
    write(out, contents)
    return contents


def lines(path: Path) -> list[str]:
    """What is inside a reference file, one line each."""
    contents = read_contents(path, "FILE")
    about = contents.about
    found = [f"file             {path}", f"SHA-256          {sha256_of(path)}"]
    usual = ("format", "dataset", "num_images", "extractor", "extractor_sha256", "resize", "crop", "size", "features_of")
    rest = sorted(key for key in about if key not in (*usual, "layers", "tensors_sha256", "images"))
    for key in (*usual, *rest):
        text = about.get(key, "not recorded")
        found.append(f"{key:<16} {'not recorded' if key == 'num_images' and text == '0' else text}")
    for name, layer in contents.layers.items():
        found.append(f"layer {name:<10} {_of(layer)}")
    if contents.pixels is not None:
        found.append(f"images           {tuple(contents.pixels.shape)} uint8")
    elif about.get("images"):
        images = Arrays(path, "FILE")
        found.append(f"images           {images.pixels.shape} {np.dtype(np.uint8)}")
    return found


def _of(layer: Layer) -> str:
    parts = [f"{layer.width} columns"]
    if layer.moments is not None:
        parts.append(f"mean and covariance (trace {float(layer.moments.cov.trace()):.6g})")
    if layer.features is not None:
        parts.append(f"{len(layer.features)} rows of features ({str(layer.features.dtype).removeprefix('torch.')})")
    return ", ".join(parts)


def run_show(path: Path, as_json: bool = False) -> None:
    """Print what is inside."""
    if as_json:
        contents = read_contents(path, "FILE")
        layers = {
            name: {
                "width": layer.width,
                "moments": layer.moments is not None,
                "rows": 0 if layer.features is None else len(layer.features),
            }
            for name, layer in contents.layers.items()
        }
        print(json.dumps({"sha256": sha256_of(path), **contents.about, "layers": layers}, indent=1))
        return
    print("\n".join(lines(path)))
