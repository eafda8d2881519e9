"""What the pages of results share: a number with its interval, and where a run was made."""

from __future__ import annotations

from typing import Any

from genkit_eval.table import format_number


def cell(metric: dict[str, Any]) -> str:
    text = format_number(metric["value"])
    if not metric["interval"]:
        return text
    low, high = metric["interval"]
    return f"{text} <sub>{format_number(low)} - {format_number(high)}</sub>"


def made_with(run: dict[str, Any]) -> str:
    hardware = run["hardware"]
    cpu = hardware.get("cpu", "unknown")
    return f"`{run['command']}` · {run['date'][:10]} · {cpu}, {hardware.get('cores')} cores"
