"""Folders and zip files of encoded images."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

from genkit_eval.errors import InputError
from genkit_eval.images.source import Source, folder_labels, in_byte_order, is_image, json_labels

LABELS_FILE = "dataset.json"


def digest_of(content: bytes) -> str:
    """CRC-32 and size: what a zip knows of its members anyway, so that a folder and its zip are one dataset."""
    return f"{zlib.crc32(content):08x}:{len(content)}"


class _Files(Source):
    def settle(self, found: list[str], labels: bytes | None, option: str) -> None:
        """Sort what was found into images and others, and label them; InputError when there is no image."""
        names = in_byte_order([name for name in found if is_image(name)])
        self.names = names
        self.skipped = tuple(in_byte_order([name for name in found if not is_image(name) and name != LABELS_FILE]))
        if not names:
            seen = f"; {len(found)} other files, such as {found[0]}" if found else ""
            raise InputError(option, f"{self.uri} holds no images{seen}. Files that end in .png, .jpg, .JPEG and the like work")
        if labels is None:
            self.labels, self.class_names = folder_labels(names)
            return
        try:
            self.labels = json_labels(labels, names)
        except ValueError as error:
            raise InputError(option, f"{LABELS_FILE} in {self.uri}: {error}") from None


class Folder(_Files):
    """All images under a folder; subfolders are classes. Links are followed."""

    def __init__(self, path: Path, option: str = "IMAGES") -> None:
        self.uri, self.root = str(path), path
        found, seen = list[str](), set[str]()
        for folder, below, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()  # a link to a folder above: walking on would never end
                continue
            seen.add(real)
            relative = os.path.relpath(folder, path).replace(os.sep, "/")
            found += [name if relative == "." else f"{relative}/{name}" for name in files]
        labels = path / LABELS_FILE
        self.settle(found, labels.read_bytes() if labels.is_file() else None, option)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.names[index]).read_bytes()

    def digest(self, index: int) -> str:
        """CRC-32 and size of the file."""
        return digest_of(self.read(index))


class Zip(_Files):
    """All images in a zip: ImageNet layout, flat, or an EDM ``dataset.zip`` with its ``dataset.json``."""

    def __init__(self, path: Path, option: str = "IMAGES") -> None:
        self.uri = str(path)
        try:
            self.zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(option, f"{path} cannot be read as a zip ({error})") from None
        self.members = {info.filename: info for info in self.zip.infolist() if not info.is_dir()}
        labels = self.zip.read(LABELS_FILE) if LABELS_FILE in self.members else None
        self.settle(list(self.members), labels, option)

    def read(self, index: int) -> bytes:
        """The member's bytes, checked against its CRC."""
        return self.zip.read(self.members[self.names[index]])

    def digest(self, index: int) -> str:
        """CRC-32 and size as the zip has them."""
        info = self.members[self.names[index]]
        return f"{info.CRC:08x}:{info.file_size}"
