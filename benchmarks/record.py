"""Where a measurement was made, and when: written beside every number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit_eval import provenance


def save(path: str | Path, command: str, result: dict[str, Any]) -> None:
    """Write a run file: the result with command, hardware and date."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": f"python {command}", "date": provenance.now(), "git": provenance.git_commit()}
    about |= {"hardware": provenance.hardware("cpu"), "versions": provenance.versions()}
    target.write_text(json.dumps({**about, **result}, indent=1) + "\n")
