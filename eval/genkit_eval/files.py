"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from genkit_eval.errors import InputError

TEMPORARY = ".writing"


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name beside ``path`` and rename: a reader never sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        probe = folder / f"probe-{uuid.uuid4().hex[:8]}{TEMPORARY}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise InputError(
            option, f"cannot write in {folder} ({error.strerror or error}); a folder you may write to works"
        ) from None
