"""The JSON file that keeps fitted LinearAG coefficients, one entry for each sampler, number of steps, scale and grid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "genkit-linear-ag-1"
KEYS = ("sampler", "steps", "scale", "grid")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All entries of a file. Raises ValueError if it is damaged or of another kind, FileNotFoundError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read as JSON ({error}); give a file written by LinearAG.save") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise ValueError(f"path={str(path)!r} is not a file of format {FORMAT!r}; give a file written by LinearAG.save")
    entries: list[dict[str, Any]] = content["entries"]
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
    content = {"format": FORMAT, "entries": [*kept, {**key, **values}]}
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, file)


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
