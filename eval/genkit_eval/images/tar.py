"""Tar files: plain ones, ImageNet's tar of tars, and the shards of webdataset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genkit_eval.errors import InputError
from genkit_eval.images.containers import digest_of
from genkit_eval.images.source import Source, folder_labels, in_byte_order, is_image


@dataclass(frozen=True)
class _Member:
    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def _members(path: Path, file: BinaryIO, start: int, end: int, prefix: str) -> Iterator[tuple[str, _Member]]:
    """Members of the archive that begins at ``start``; tars inside it are entered, under the name without ``.tar``."""
    file.seek(start)
    with tarfile.TarFile(fileobj=file) as archive:
        infos = [info for info in archive if info.isreg() and info.offset_data < end]
    for info in infos:
        name = prefix + info.name.removeprefix("./")
        if name.endswith(".tar"):
            stop = info.offset_data + info.size
            yield from _members(path, file, info.offset_data, stop, f"{name.removesuffix('.tar')}/")
        else:
            yield name, _Member(path, info.offset_data, info.size)


class Tar(Source):
    """Images of one tar file or of many shards, read in place.

    Labels come from the ``.cls`` member (or ``"label"`` in the ``.json`` one) with the same key, else from folders. With several
    shards a name begins with its shard's, so that equal keys in two of them stay apart.
    """

    def __init__(self, paths: Sequence[Path], uri: str, option: str = "IMAGES") -> None:
        self.uri = uri
        self.members: dict[str, _Member] = {}
        for path in paths:
            prefix = f"{path.stem}/" if len(paths) > 1 else ""
            try:
                with path.open("rb") as file:
                    self.members.update(_members(path, file, 0, path.stat().st_size, prefix))
            except (OSError, tarfile.TarError) as error:
                raise InputError(option, f"{path} cannot be read as a tar ({error}); a whole, uncompressed one works") from None
        self.names = in_byte_order([name for name in self.members if is_image(name)])
        if not self.names:
            raise InputError(option, f"{uri} holds no images; members that end in .png, .jpg, .JPEG and the like work")
        beside = {name: key for name in self.names if (key := self._label_member(name))}
        self.skipped = tuple(in_byte_order([n for n in self.members if not is_image(n) and n not in set(beside.values())]))
        if len(beside) == len(self.names):
            self.labels = [self._label(beside[name], option) for name in self.names]
        elif len(paths) == 1:
            self.labels, self.class_names = folder_labels(self.names)

    def _label_member(self, name: str) -> str | None:
        folder, _, file = name.rpartition("/")
        key = f"{folder}/{file.split('.')[0]}" if folder else file.split(".")[0]
        return next((key + ending for ending in (".cls", ".json") if key + ending in self.members), None)

    def _label(self, name: str, option: str) -> int:
        text = self.members[name].read()
        try:
            return int(json.loads(text)["label"] if name.endswith(".json") else text)
        except (ValueError, KeyError, TypeError):
            raise InputError(option, f"{name} in {self.uri} holds no class number") from None

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        return self.members[self.names[index]].read()

    def digest(self, index: int) -> str:
        """CRC-32 and size of the member."""
        return digest_of(self.read(index))
