"""A chosen, ordered part of a source, decoded in the background ahead of whoever needs the pixels."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from genkit_eval.images.problems import Problems
from genkit_eval.images.source import Source
from genkit_eval.images.view import View, decode

MOST_WORKERS = 16
# Decoded images per worker that wait for the network: enough for a slow file not to be felt, 16 x 16 x 256 px is 50 MB.
AHEAD = 16


@dataclass
class Batch:
    """Consecutive images: their positions, pixels uint8 (3, H, W) each, and what was wrong with those that are missing."""

    positions: list[int] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    asked: int = 0


def default_workers() -> int:
    """One thread for each core that this process may use, at most 16: PIL decodes and resizes without the interpreter's lock."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


class Images:
    """The images ``chosen`` of ``source``, each seen through ``view``.

    Args:
        source: where they are.
        view: crop and size.
        chosen: indices into the source, in the order of use; None is all.
        max_errors: files that may be unreadable, default 0.
        option: what the user typed them under, for errors.
    """

    def __init__(
        self,
        source: Source,
        view: View | None = None,
        chosen: Sequence[int] | None = None,
        max_errors: int = 0,
        option: str = "IMAGES",
    ) -> None:
        self.source = source
        self.view = view or View()
        self.chosen = range(len(source.names)) if chosen is None else chosen
        self.max_errors, self.option = max_errors, option
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def uri(self) -> str:
        """Where the images are."""
        return self.source.uri

    @property
    def fingerprint(self) -> str:
        """SHA-256 over name and digest of each image in order: equal for a folder and a zip of it, another when one byte changes.

        The first use reads every file of a folder or tar once; a zip knows the digests.
        """
        if self._fingerprint is None:
            total = hashlib.sha256()
            with ThreadPoolExecutor(default_workers()) as pool:
                for index, digest in zip(self.chosen, pool.map(self.source.digest, self.chosen, chunksize=64), strict=True):
                    name = self.source.names[index].encode("utf-8", "surrogateescape")
                    total.update(name + b"\0" + digest.encode() + b"\n")
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def labels(self, positions: Sequence[int]) -> list[int] | None:
        """Classes of the images at ``positions``, None where the source has none."""
        known = self.source.labels
        return None if known is None else [known[self.chosen[k]] for k in positions]

    def as_dict(self) -> dict[str, Any]:
        """For files and results: where from, how many, which, and how cut."""
        return {"uri": self.uri, "fingerprint": self.fingerprint, "n": len(self), "crop": self.view.crop, "size": self.view.size}

    def _load(self, position: int) -> tuple[Tensor | None, str, list[str]]:
        """Pixels or the reason why there are none, and the kinds that are noted."""
        index = self.chosen[position]
        try:
            pixels, kinds = decode(self.source.read(index), self.view)
        except Exception as error:  # a damaged file may raise anything in a decoder: it is counted and named
            return None, " ".join(str(error).split()) or type(error).__name__, []
        return pixels, "", kinds

    def batches(self, size: int, positions: Sequence[int] | None = None, workers: int | None = None) -> Iterator[Batch]:
        """Batches of ``size`` consecutive ``positions`` (default all), in order; the last may be shorter.

        Decoding runs in ``workers`` threads (default: one for each core), ``AHEAD`` images for each of them in advance.
        Unreadable files are missing from their batch and named in its ``problems``.
        """
        wanted = range(len(self)) if positions is None else positions
        threads = workers or default_workers()
        waiting: deque[Future[tuple[Tensor | None, str, list[str]]]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            coming = iter(wanted)
            batch = Batch()
            for position in wanted:
                while len(waiting) < threads * AHEAD and (following := next(coming, None)) is not None:
                    waiting.append(pool.submit(self._load, following))
                self._put(batch, position, *waiting.popleft().result())
                if batch.asked == size:
                    yield batch
                    batch = Batch()
            if batch.asked:
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, batch: Batch, position: int, pixels: Tensor | None, reason: str, kinds: list[str]) -> None:
        name = self.source.names[self.chosen[position]]
        batch.asked += 1
        if pixels is None:
            batch.problems.errors.append((name, reason))
            return
        batch.positions.append(position)
        batch.pixels.append(pixels)
        for kind in kinds:
            batch.problems.note(kind, name)
