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
from genkit_eval.extractors import Extractor
from genkit_eval.files import read_json, write_json
from genkit_eval.metrics import Sample
from genkit_eval.references import Reference
from genkit_eval.score import STANDARD, Bootstrap, Metrics, cost, missing, score

#: What of an entry must be the same for its numbers to be kept.
KEYS = ("reference_sha256", "bootstrap", "extra_metrics", "standard_metrics")


@dataclass(frozen=True)
class Scoring:
    """What images are compared with, and how: reference, resamples, the extractor that numbers are named after, the metrics."""

    reference: Reference
    bootstrap: Bootstrap
    extractor: Extractor
    metrics: Metrics = STANDARD

    def as_dict(self) -> dict[str, Any]:
        """The part of an entry that says which numbers may stand beside its own."""
        known = {"reference_sha256": self.reference.sha256, "bootstrap": self.bootstrap.as_dict()}
        return known | self.metrics.as_dict()

    def agrees(self, entry: dict[str, Any]) -> bool:
        """Whether ``entry`` was scored in this way, and its numbers have the names that they would have now."""
        known = self.metrics.specs(self.extractor)
        return all(entry.get(key) == self.as_dict().get(key) for key in KEYS) and all(
            name in known
            and metric["variant"] == known[name][0].protocol(known[name][1], metric["n_real"] or 0, metric["n_fake"])
            for name, metric in entry["metrics"].items()
        )


def scored(folder: Path, fake: Sample, stamp: str, scoring: Scoring) -> dict[str, Any]:
    """Scores from the folder if they belong to exactly these images and settings, else computed and stored."""
    specs = sorted(
        (name, spec.protocol(network, 0, 0), spec.interval_of)
        for name, (spec, network) in scoring.metrics.specs(scoring.extractor).items()
    )
    protocol = [stamp, len(fake), scoring.as_dict(), specs]
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
    metrics = score(fake, scoring.reference, scoring.extractor, scoring.bootstrap, scoring.metrics)
    write_json(path, {"key": key, "metrics": metrics})
    return metrics


def sample_of(block: Block) -> Sample:
    """A block as the metrics see it."""
    return Sample(block.features, layers=block.layers, labels=block.labels)


def describe(out: Path, label: str, expression: str, stamp: str, fake: Sample, scoring: Scoring) -> dict[str, Any]:
    """Score ``fake`` and describe it: what an entry has whether its images were made here or found.

    ``expression`` names the entry's folder; ``stamp`` is a hash of everything that the images depend on.
    """
    name = slug(expression)
    metrics = scored(out / name, fake, stamp, scoring)
    hidden = ("replicates", "basis")
    lacking = missing(fake, scoring.reference, scoring.extractor, scoring.metrics)
    return {
        "label": label,
        "guidance": expression,
        "slug": name,
        "config_sha256": stamp,
        "n": len(fake),
        **scoring.as_dict(),
        "metrics": {key: {k: v for k, v in metric.items() if k not in hidden} for key, metric in metrics.items()},
        **({"not_available": lacking} if lacking else {}),
        "grid": f"{name}/grid.png",
    }


def make_entry(out: Path, text: str, guidance: str, stamp: str, block: Block, scoring: Scoring) -> dict[str, Any]:
    """Score ``block`` and describe it; ``guidance`` is the ``repr``, ``text`` what was typed."""
    entry = describe(out, text, guidance, stamp, sample_of(block), scoring)
    return {**entry, "made_with": block.made_with, "cost": cost(block), "trace": block.trace}


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
