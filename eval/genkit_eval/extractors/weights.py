"""Weights files: fetched on first use, or given; never used under a hash that is not theirs."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from genkit.files import write_atomically
from genkit_eval.errors import InputError
from genkit_eval.files import temporary_beside

TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class WeightsFile:
    """A published file: its name in the cache, where it comes from, and its hash.

    ``aliases`` are names under which torch.hub may hold it already.
    """

    name: str
    url: str
    sha256: str
    aliases: tuple[str, ...] = ()

    def copies(self) -> Iterator[Path]:
        """Where other tools may have put the file."""
        yield from (Path(torch.hub.get_dir()) / "checkpoints" / name for name in self.aliases)


@dataclass(frozen=True)
class HubFile(WeightsFile):
    """A file of a Hugging Face repository at one commit."""

    repository: str = ""
    revision: str = ""

    @classmethod
    def at(cls, repository: str, revision: str, path: str, sha256: str) -> HubFile:
        """The file ``path`` of ``repository`` at the commit ``revision``."""
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{host}/{repository}/resolve/{revision}/{path}"
        return cls(f"{repository.replace('/', '--')}--{path}", url, sha256, (path,), repository, revision)

    def copies(self) -> Iterator[Path]:
        """The cache of huggingface_hub."""
        found = try_to_load_from_cache(self.repository, self.aliases[0], revision=self.revision)
        if isinstance(found, str):
            yield Path(found)


def cache_folder() -> Path:
    """``$GENKIT_CACHE``, else ``~/.cache/genkit``."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(file: WeightsFile, path: Path | None = None, any_weights: bool = False) -> tuple[Path, str]:
    """Where the weights are, and their sha256: ``path`` if given, else the cache, filled on first use.

    Raises InputError when the file cannot be read or fetched, and for another hash than the published one unless ``any_weights``.
    """
    if path is None:
        path, any_weights, way = _cached(file), False, "delete it, and it is fetched again"
    else:
        way = f"get it from {file.url}, or add --any-weights to use this file under another name"
    try:
        found = sha256_of(path)
    except OSError as error:
        raise InputError("--weights", f"{path} cannot be read ({error.strerror or error}); {file.name} works") from None
    if found != file.sha256 and not any_weights:
        raise InputError(
            "--weights",
            f"{path} has sha256 {found}, but {file.name} as published has {file.sha256}; {way}",
        )
    return path, found


def named(sha256: str, file: WeightsFile) -> str:
    """What a name gets appended: nothing for the published weights, else ``@`` and the start of their hash."""
    return "" if sha256 == file.sha256 else f"@{sha256[:8]}"


def _cached(file: WeightsFile) -> Path:
    target = cache_folder() / file.name
    if target.exists():
        return target
    for copy in file.copies():
        if copy.is_file() and sha256_of(copy) == file.sha256:
            return copy
    try:
        write_atomically(target, lambda temporary: _fetch(file, temporary), temporary_beside(target))
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise InputError(
            "--weights",
            f"cannot fetch {file.url} ({reason}); get it elsewhere and put it at {target}, or give it by --weights PATH",
        ) from None
    return target


def _fetch(file: WeightsFile, target: Path) -> None:
    with urllib.request.urlopen(file.url, timeout=TIMEOUT) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    found = sha256_of(target)
    if found != file.sha256:
        raise InputError(
            "--weights", f"{file.url} gave a file with sha256 {found}, not {file.sha256}; it was not kept, try again"
        )
