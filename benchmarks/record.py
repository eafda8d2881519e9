"""Where a measurement was made, and when: written beside every number."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit_eval import provenance


def command(arguments: Sequence[str] | None = None) -> str:
    """How the script was called (``sys.argv``): of folders and files that exist only their names, and not where it writes."""
    script, *given = sys.argv if arguments is None else arguments
    said = [f"benchmarks/{Path(script).name}"]
    following = iter(given)
    for word in following:
        option, equals, value = word.partition("=")
        if option == "--out":
            if not equals:
                next(following, None)
            continue
        said.append(f"{option}={_named(value)}" if equals else _named(word))
    return shlex.join(["python", *said])


def _named(word: str) -> str:
    return Path(word).name if "/" in word and Path(word).exists() else word


def save(path: str | Path, result: dict[str, Any]) -> None:
    """Write a run file: the result with command, hardware and date."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": command(), "date": provenance.now(), "git": provenance.git_commit()}
    about |= {"hardware": provenance.hardware("cpu"), "versions": provenance.versions()}
    target.write_text(json.dumps({**about, **result}, indent=1) + "\n")
