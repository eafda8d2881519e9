"""Metrics of one guidance's images, with bootstrap intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit_eval.blocks import Block
from genkit_eval.errors import InputError
from genkit_eval.metrics import METRICS, Pair, Sample, Spec, unavailable
from genkit_eval.metrics.counts import Counts, draw_counts, interval
from genkit_eval.references import Reference

LEVEL = 0.95
# Extra digits would only make the file longer: replicates serve intervals of differences.
REPLICATE_DIGITS = 9
MIN_SAMPLES = 8


@dataclass(frozen=True)
class Bootstrap:
    """Number of resamples (0 for none) and their seed."""

    replicates: int = 200
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "replicates": self.replicates,
            "seed": self.seed,
            "level": LEVEL,
            "rule": "centred percentile; resamples shared between guidances, so differences are paired by seed and class",
        }


def basis(reference_sha256: str, bootstrap: Bootstrap) -> str:
    """Short hash of what resamples depend on beside the images: two scores can be subtracted only where it is the same."""
    return hashlib.sha256(json.dumps([reference_sha256, bootstrap.as_dict()]).encode()).hexdigest()[:16]


def chosen(extra: Sequence[str] = ()) -> list[Spec]:
    """The standard metrics and those asked for by name; InputError for a name that is not registered."""
    unknown = [name for name in extra if name not in METRICS]
    if unknown:
        raise InputError("--metric", f"got {unknown[0]!r}; one of {', '.join(METRICS)} works")
    return [spec for name, spec in METRICS.items() if spec.standard or name in extra]


def score(
    fake: Sample, reference: Reference, label: str, bootstrap: Bootstrap, extra: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Every metric that can be computed: value, protocol, sample counts, interval and its replicates.

    ``label`` is the extractor's, for titles such as ``FD-CIFAR10``. ``extra`` names metrics beside the standard ones.
    """
    pair = Pair(reference.sample, fake)
    counts = draw_counts(len(pair.fake), len(pair.real), bootstrap.replicates, bootstrap.seed) if bootstrap.replicates else None
    found = {}
    for spec in chosen(extra):
        if unavailable(spec, pair) is None:
            found[spec.name] = _numbers(spec, pair, reference, label, bootstrap, counts)
    return found


def _numbers(
    spec: Spec, pair: Pair, reference: Reference, label: str, bootstrap: Bootstrap, counts: Counts | None
) -> dict[str, Any]:
    value = spec.value(pair)
    replicates = spec.replicates(pair, counts) if counts is not None else None
    n_real = {"none": None, "moments": reference.num_images or None}.get(spec.reference, len(pair.real))
    return {
        "title": spec.heading(label),
        "variant": spec.protocol(n_real or 0, len(pair.fake)),
        "better": spec.better,
        "value": value,
        "interval": None if replicates is None else list(interval(value, replicates, LEVEL, spec.bounds)),
        "interval_of": spec.interval_of,
        "n_fake": len(pair.fake),
        "n_real": n_real,
        "basis": basis(reference.sha256, bootstrap),
        "replicates": None if replicates is None else [float(f"{r:.{REPLICATE_DIGITS}g}") for r in replicates.tolist()],
    }


def missing(fake: Sample, reference: Reference, label: str, extra: Sequence[str] = ()) -> dict[str, str]:
    """Why metrics are not among the scores, by title.

    Standard ones that read a layer which the extractor does not make are not worth a word; those asked for by name are.
    """
    pair, found = Pair(reference.sample, fake), {}
    for spec in chosen(extra):
        reason = unavailable(spec, pair)
        if reason is not None and (spec.name in extra or all(layer in fake.layers for layer in spec.inputs)):
            found[spec.heading(label)] = reason
    return found


def cost(block: Block) -> dict[str, Any]:
    """Evaluations and seconds per image."""
    nfe = block.nfe.double()
    return {
        "nfe_mean": float(nfe.mean()),
        "nfe_min": int(nfe.min()),
        "nfe_max": int(nfe.max()),
        "calls": block.calls,
        "seconds_wall": block.wall / len(block),
        "seconds_cpu": block.cpu / len(block),
    }


def difference(scores: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any] | None:
    """``value - baseline value`` with its paired interval; None where reference, resamples, count or protocol differ."""
    ours, theirs = scores.get("replicates"), baseline.get("replicates")
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    if any(scores.get(key) != baseline.get(key) for key in ("basis", "n_fake", "variant")):
        return None
    value = scores["value"] - baseline["value"]
    deviations: Tensor = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return {"value": value, "interval": list(interval(value, deviations, LEVEL))}
