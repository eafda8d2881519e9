"""What can be taken away: the images, JSON that says how to make them again, and Python that does."""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import genkit
from genkit_apps.generation import Column, Request


def file_name(column: int, image: int) -> str:
    """The PNG of an image, both numbers from 1."""
    return f"column{column}-image{image:02d}.png"


def snippet(request: Request, guidances: Mapping[int, str]) -> str:
    """Python that makes the same images, pixel for pixel, and saves them under the names of the bundle.

    Args:
        guidances: expressions by the number of their column, from 1.
    """
    what = f"prompt = {list(request.prompts)!r}" if request.prompts else f"classes = {_classes(request)!r}"
    arguments = ["prompt=prompt" if request.prompts else "classes=classes", "seeds=seeds", "guidance=guidance"]
    if request.model.diffusers:
        arguments[0] = "prompt" if request.prompts else "class_labels=classes"
        arguments += [f"sampler={request.sampler!r}", f"num_inference_steps={request.steps}"]
    elif request.sampler is not None:
        arguments += [f"sampler={request.sampler!r}", f"steps={request.steps}"]
    columns = "".join(f"    {c}: {text!r},\n" for c, text in guidances.items())
    device = f", device={request.model.device!r}" if request.model.device != "cpu" else ""
    return (
        "import genkit\n\n"
        f"pipe = genkit.load({request.model.name!r}{device})\n"
        f"{what}\n"
        f"seeds = {list(request.seeds)!r}\n"
        f"guidances = {{\n{columns}}}\n\n"
        "for c, guidance in guidances.items():\n"
        f"    out = pipe({', '.join(arguments)})\n"
        "    print(guidance, out.nfe)\n"
        "    for k, image in enumerate(out.images, 1):\n"
        '        image.save(f"column{c}-image{k:02d}.png")\n'
    )


def numbered(columns: Sequence[Column]) -> dict[int, str]:
    """The guidances of the columns that have images, by number."""
    return {c: column.guidance for c, column in enumerate(columns, 1) if column.images}


def record(request: Request, columns: Sequence[Column]) -> dict[str, Any]:
    """All that made the images, and what they cost, as plain values."""
    return {
        "schema": "genkit-demo-compare-1",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": request.model.name,
        "kind": request.model.kind,
        "fingerprint": getattr(request.model.pipe, "fingerprint", ""),
        "classes": list(request.classes),
        "class_names": [request.name(k) for k in range(len(request.classes))],
        "prompts": list(request.prompts),
        "seeds": list(request.seeds),
        "sampler": request.sampler,
        "steps": request.steps,
        "columns": [_column(c, column) for c, column in enumerate(columns, 1)],
        "versions": {"genkit": genkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": request.model.device,
    }


def write_bundle(folder: Path, request: Request, columns: Sequence[Column]) -> Path:
    """The zip of all of it in ``folder``: PNGs, ``comparison.json``, ``reproduce.py``."""
    path = folder / f"genkit-{datetime.now(UTC):%Y%m%d-%H%M%S}.zip"
    with zipfile.ZipFile(path, "w") as archive:  # PNGs are compressed already
        for c, column in enumerate(columns, 1):
            for k, image in enumerate(column.images, 1):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                archive.writestr(file_name(c, k), buffer.getvalue())
        archive.writestr("comparison.json", json.dumps(record(request, columns), indent=2))
        archive.writestr("reproduce.py", snippet(request, numbered(columns)))
    return path


def _column(number: int, column: Column) -> dict[str, Any]:
    if not column.images:
        return {"guidance": column.guidance, "error": column.error or "cancelled"}
    return {
        "guidance": column.guidance,
        "nfe": list(column.nfe),
        "calls": column.calls,
        "seconds": round(column.seconds, 3),
        "images": [file_name(number, k) for k in range(1, len(column.images) + 1)],
    }


def _classes(request: Request) -> list[int | str]:
    """Names where there are some: the snippet is for people."""
    if request.model.diffusers or not request.model.class_names:
        return list(request.classes)
    return [request.model.class_names[c] for c in request.classes]


__all__ = ["file_name", "numbered", "record", "snippet", "write_bundle"]
