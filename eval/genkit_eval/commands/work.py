"""What ``score`` and ``reference`` share: the network, the images, the cache, and a bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor, Given, load_extractor
from genkit_eval.extractors.weights import cache_folder
from genkit_eval.images import Images, open_images
from genkit_eval.references.build import Work


@dataclass(frozen=True)
class Network:
    """Which extractors, as typed: names, weights files, resize rules and device; None is the extractor's own."""

    name: str = "builtin/cifar10"
    weights: Given = None
    resize: Given = None
    device: str = "cpu"
    any_weights: bool = False

    def load(self) -> Extractor:
        """The extractor; InputError for a device, a name or weights that do not work."""
        from genkit_eval.command import check_device

        check_device(self.device)
        return load_extractor(self.name, self.device, self.weights, self.resize, self.any_weights)


@dataclass(frozen=True)
class Looking:
    """How images are looked at, as typed: size, crop, count, files that may be unreadable, batch, threads, cache."""

    size: int | None = None
    crop: str | None = None
    num_images: int | None = None
    max_errors: int = 0
    batch_size: int = 64
    workers: int | None = None
    cache: bool = True

    def open(self, uri: str, option: str) -> Images:
        """The images behind ``uri``. InputError for numbers out of range and where there are none."""
        for name, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise InputError(name, f"got {value}; 1 or more works")
        if self.max_errors < 0:
            raise InputError("--max-errors", f"got {self.max_errors}; 0 or more works")
        return open_images(uri, self.size, self.crop, self.num_images, self.max_errors, option)

    @contextmanager
    def work(self, device: str, images: int, title: str, spread: bool = False) -> Iterator[Work]:
        """What ``build`` and ``load_reference`` need, with a bar over so many images; ``spread`` over all processes."""
        with tqdm(total=images or None, unit="img", file=sys.stderr, desc=title, dynamic_ncols=True, leave=False) as bar:
            pin = device.startswith("cuda")
            yield Work(cache_folder() if self.cache else None, self.batch_size, self.workers, bar.update, pin, spread)
