"""Entries of the results: scores of stored blocks, with what they were compared with and made by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit_eval import results
from genkit_eval.blocks import Block, BlockStore
from genkit_eval.config import slug
from genkit_eval.errors import InputError
from genkit_eval.files import read_json, write_json
from genkit_eval.metrics import METRICS
from genkit_eval.reference import Reference
from genkit_eval.score import Bootstrap, cost, score


@dataclass(frozen=True)
class Scoring:
    """What images are compared with, and how: reference, resamples, and the extractor's label for titles."""

    reference: Reference
    bootstrap: Bootstrap
    label: str

    def as_dict(self) -> dict[str, Any]:
        """The part of an entry that says which numbers may stand beside its own."""
        return {"reference_sha256": self.reference.sha256, "bootstrap": self.bootstrap.as_dict()}

    def agrees(self, entry: dict[str, Any]) -> bool:
        """Whether ``entry`` was scored in this way."""
        return all(entry.get(key) == value for key, value in self.as_dict().items())


def scored(folder: Path, block: Block, stamp: str, scoring: Scoring) -> dict[str, Any]:
    """Scores from the folder if they belong to exactly these images and settings, else computed and stored."""
    specs = sorted((name, spec.variant, spec.interval_of) for name, spec in METRICS.items())
    protocol = [stamp, len(block), scoring.as_dict(), specs]
    key = hashlib.sha256(json.dumps(protocol).encode()).hexdigest()
    path = folder / results.SCORES
    if path.exists():
        try:
            stored: dict[str, Any] = read_json(path, "--out")
        except InputError:
            stored = {}
        if stored.get("key") == key:
            metrics: dict[str, Any] = stored["metrics"]
            return metrics
    metrics = score(block, scoring.reference, scoring.label, scoring.bootstrap)
    write_json(path, {"key": key, "metrics": metrics})
    return metrics


def make_entry(out: Path, text: str, guidance: str, stamp: str, block: Block, scoring: Scoring) -> dict[str, Any]:
    """Score ``block`` and describe it; ``guidance`` is the ``repr``, ``text`` what was typed."""
    name = slug(guidance)
    metrics = scored(out / name, block, stamp, scoring)
    hidden = ("replicates", "basis")
    return {
        "label": text,
        "guidance": guidance,
        "slug": name,
        "config_sha256": stamp,
        "n": len(block),
        **scoring.as_dict(),
        "made_with": block.made_with,
        "metrics": {key: {k: v for k, v in metric.items() if k not in hidden} for key, metric in metrics.items()},
        "cost": cost(block),
        "trace": block.trace,
        "grid": f"{name}/grid.png",
    }


def settle(out: Path, entries: list[dict[str, Any]], asked: set[str], block_size: int, scoring: Scoring) -> list[dict[str, Any]]:
    """``entries`` with those of another reference or bootstrap scored again from their blocks.

    One whose blocks are gone is left out if its guidance (``repr``) is ``asked`` for anyway; otherwise InputError.
    """
    found = []
    for entry in entries:
        if scoring.agrees(entry):
            found.append(entry)
            continue
        store = BlockStore(out / entry["slug"] / "blocks", entry["config_sha256"])
        starts = range(0, entry["n"], block_size)
        if all(store.done(i, min(block_size, entry["n"] - start)) for i, start in enumerate(starts)):
            block = store.read_all(entry["n"], block_size)
            found.append(make_entry(out, entry["label"], entry["guidance"], entry["config_sha256"], block, scoring))
        elif entry["guidance"] not in asked:
            raise InputError(
                "--out",
                f"{out} holds scores of {entry['label']} with another --reference or --bootstrap, and not the blocks to score it "
                "again; choose another folder, or --overwrite",
            )
    return found
