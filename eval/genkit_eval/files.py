"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from genkit.files import write_atomically
from genkit_eval.errors import InputError

TEMPORARY = ".writing"
#: Seconds after which a temporary file is left over, whoever made it.
STALE_AFTER = 3600.0
# Two machines may share the folder, and a process number says nothing about a process of the other one.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A name beside ``path`` that no other process uses: ``<name>.<machine>.<pid>.<random>.writing``."""
    return path.with_name(f"{path.name}.{_MACHINE}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def in_use(temporary: Path) -> bool:
    """Whether another process may still be at work on this temporary file: younger than an hour, and its process not gone."""
    try:
        if time.time() - temporary.stat().st_mtime > STALE_AFTER:
            return False
    except OSError:
        return False
    *_, machine, pid, _random, _ending = ["", "", "", "", *temporary.name.split(".")]
    if machine != _MACHINE or not pid.isdigit():
        return True
    return int(pid) != os.getpid() and _alive(int(pid))


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone left half written in ``folder`` and below."""
    for path in folder.glob(f"**/*{TEMPORARY}"):
        if not in_use(path):
            path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name beside ``path`` and rename: a reader never sees a part."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content), temporary_beside(path))


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` of indented JSON; NaN and infinities are refused, as JSON has none."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, option: str) -> Any:
    """Parsed JSON; InputError naming ``option`` when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(option, f"there is no {path}; a folder written by 'genkit-eval run' works") from None
    except (OSError, ValueError) as error:
        raise InputError(
            option, f"{path} cannot be read ({error}); run again with --overwrite, or choose another folder"
        ) from None


def check_writable(folder: Path, option: str = "--out") -> None:
    """Make ``folder`` and prove that a file can be written there; InputError otherwise, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(folder / "probe")
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise InputError(
            option, f"cannot write in {folder} ({error.strerror or error}); a folder you may write to works"
        ) from None
