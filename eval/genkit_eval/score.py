"""Metrics of one guidance's images, with bootstrap intervals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit_eval.blocks import Block
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import Pair, Sample, Spec, unavailable
from genkit_eval.metrics.counts import Counts, draw_counts, interval
from genkit_eval.references import Reference
from genkit_eval.selection import Metrics as Metrics

LEVEL = 0.95
# Extra digits would only make the file longer: replicates serve intervals of differences.
REPLICATE_DIGITS = 9
MIN_SAMPLES = 8
STANDARD = Metrics()


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


def score(
    fake: Sample, reference: Reference, extractor: Extractor, bootstrap: Bootstrap, metrics: Metrics = STANDARD
) -> dict[str, dict[str, Any]]:
    """Every metric that can be computed: value, protocol, sample counts, interval and its replicates.

    ``extractor`` is the one of both sets, which titles and protocols name. ``metrics`` are those to compute.
    """
    pair = Pair(reference.sample.also(extractor.part), fake.also(extractor.part))
    counts = draw_counts(len(pair.fake), len(pair.real), bootstrap.replicates, bootstrap.seed) if bootstrap.replicates else None
    found = {}
    for name, (spec, network) in metrics.specs(extractor).items():
        if unavailable(spec, pair) is None:
            found[name] = _numbers(spec, pair, reference, network, bootstrap, counts)
    return found


def _numbers(
    spec: Spec, pair: Pair, reference: Reference, extractor: Extractor, bootstrap: Bootstrap, counts: Counts | None
) -> dict[str, Any]:
    value = spec.value(pair)
    replicates = spec.replicates(pair, counts) if counts is not None else None
    if replicates is not None and bool((replicates == value).all()):
        replicates = None  # too few images to say how far it spreads, which is not the same as not at all
    n_real = {"none": None, "moments": reference.num_images or None}.get(spec.reference, len(pair.real))
    return {
        "title": spec.heading(extractor),
        "variant": spec.protocol(extractor, n_real or 0, len(pair.fake)),
        "better": spec.better,
        "value": value,
        "interval": None if replicates is None else list(interval(value, replicates, LEVEL, spec.bounds)),
        "interval_of": spec.interval_of,
        "n_fake": len(pair.fake),
        "n_real": n_real,
        "basis": basis(reference.sha256, bootstrap),
        "replicates": None if replicates is None else [float(f"{r:.{REPLICATE_DIGITS}g}") for r in replicates.tolist()],
    }


def missing(fake: Sample, reference: Reference, extractor: Extractor, metrics: Metrics = STANDARD) -> dict[str, str]:
    """Why metrics are not among the scores, by title.

    Standard ones that read a layer which the extractor does not make are not worth a word; those asked for by name are.
    """
    pair, found = Pair(reference.sample.also(extractor.part), fake.also(extractor.part)), {}
    for name, (spec, network) in metrics.specs(extractor).items():
        reason = unavailable(spec, pair)
        if reason is not None and (name in metrics.names or all(layer in fake.layers for layer in spec.inputs)):
            found[spec.heading(network)] = reason
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
