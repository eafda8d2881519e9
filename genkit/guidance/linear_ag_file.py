"""The JSON file that keeps fitted LinearAG coefficients, one entry for each sampler, number of steps, scale and grid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.files import read_json, write_json

FORMAT = "genkit-linear-ag-1"
KEYS = ("sampler", "steps", "scale", "grid")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All entries of a file. Raises ValueError if it is damaged or of another kind, FileNotFoundError if there is none."""
    entries: list[dict[str, Any]] = read_json(path, FORMAT, "LinearAG.save", entries=list)["entries"]
    for i, entry in enumerate(entries):
        missing = set(KEYS) | {"coefficients", "second"}
        missing -= set(entry) if isinstance(entry, dict) else set()
        if missing:
            raise ValueError(f"path={str(path)!r}: entry {i} lacks {', '.join(sorted(missing))}; the file is damaged")
    return entries


def add(path: str | os.PathLike[str], key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write one more entry, by way of a temporary file; one with an equal key is replaced."""
    file = Path(path)
    kept = [entry for entry in (read(file) if file.exists() else []) if any(entry[k] != key[k] for k in KEYS)]
    write_json(file, {"format": FORMAT, "entries": [*kept, {**key, **values}]})


def find(path: str | os.PathLike[str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The one entry that agrees with all of ``wanted`` that is not None. Raises ValueError with what the file holds."""
    entries = read(path)
    fitting = [e for e in entries if all(value is None or e[k] == value for k, value in wanted.items())]
    if len(fitting) == 1:
        return fitting[0]
    asked = ", ".join(f"{k}={v!r}" for k, v in wanted.items() if v is not None) or "no choice made"
    listed = "; ".join(", ".join(f"{k}={e[k]!r}" for k in KEYS) for e in entries) or "nothing"
    count = "no entry fits" if not fitting else f"{len(fitting)} entries fit"
    raise ValueError(f"path={str(path)!r}: {count} ({asked}); it holds: {listed}")
