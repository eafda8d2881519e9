"""Where a measurement was made, and when: written beside every number."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """Processor name, cores in use, threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return {"cpu": name, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "torch": torch.__version__}


def save(path: str | Path, command: str, result: dict[str, Any]) -> None:
    """Write a run file: the result with command, hardware and date."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    target.write_text(
        json.dumps({"command": f"python {command}", "date": date, "hardware": hardware(), **result}, indent=1) + "\n"
    )
