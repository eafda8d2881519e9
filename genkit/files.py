"""Files that are either whole or absent, and JSON files that say what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object], temporary: Path | None = None) -> None:
    """``write(temporary)``, then rename: a reader never sees a part, and a failure leaves what was there.

    Args:
        path: of the file; its folder is made.
        write: makes the file that it is given the name of.
        temporary: a name on the same disk; None is ``<path>.tmp``.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Indented JSON, by :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1), encoding="utf-8"))


def read_json(path: str | os.PathLike[str], format: str, written_by: str, **fields: type) -> dict[str, Any]:
    """The object in a JSON file whose ``"format"`` is as given.

    Args:
        written_by: what writes such files, for the errors.
        fields: that it must have, with their types.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read as JSON ({error}); give a file written by {written_by}") from None
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    if found.get("format") != format or not all(isinstance(found.get(name), kind) for name, kind in fields.items()):
        raise ValueError(f"path={str(path)!r} is not a file of format {format!r}; give a file written by {written_by}")
    return found
