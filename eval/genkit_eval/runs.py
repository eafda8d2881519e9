"""Finished runs, read back to be reported or compared together; numbers of different protocols are kept apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit_eval.errors import InputError
from genkit_eval.files import read_json
from genkit_eval.metrics import METRICS
from genkit_eval.results import RESULTS, SCHEMA, SCORES

PARTS = {"status", "date", "warnings", "extractor", "reference", "generation"}
ENTRY_PARTS = {"label", "guidance", "slug", "config_sha256", "n", "reference_sha256", "metrics", "grid"}


@dataclass(frozen=True)
class Run:
    """A results file: ``name`` is what tells it from others, ``folder`` where scores, blocks and grids lie, if they do."""

    name: str
    folder: Path
    results: dict[str, Any]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One for each guidance (or set of images)."""
        found: list[dict[str, Any]] = self.results["guidances"]
        return found

    def scores(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The metrics of ``entry`` with their bootstrap replicates; only those whose value is that of the results."""
        path = self.folder / entry["slug"] / SCORES
        stored: dict[str, Any] = read_json(path, "RUN")["metrics"] if path.exists() else {}
        known = entry["metrics"]
        return {name: score for name, score in stored.items() if name in known and score["value"] == known[name]["value"]}


def _whole(results: dict[str, Any]) -> bool:
    """Whether there is at least one entry, and every part that a report reads."""
    entries = results.get("guidances")
    if not isinstance(entries, list) or not entries or not results.keys() >= PARTS:
        return False
    return all(isinstance(entry, dict) and entry.keys() >= ENTRY_PARTS for entry in entries)


def read_run(path: Path, name: str | None = None) -> Run:
    """The run in a folder, or a results file by itself; InputError for anything else."""
    file = path if path.is_file() else path / RESULTS
    results = read_json(file, "RUN")
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or not _whole(results):
        raise InputError("RUN", f"{file} is not a results file of this version ({SCHEMA}) with at least one guidance")
    return Run(name or str(path), file.parent, results)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, named by the last parts of their paths where these differ, else by the whole paths."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("RUN", "the same run is given twice")
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _protocol(name: str, entry: dict[str, Any], metric: dict[str, Any]) -> tuple[str, str]:
    """What must be equal for two numbers to stand in one column: the variant, and the reference where one enters.

    ``n_real`` does not say whether one does: files of other tools do not know how many images are behind their moments.
    """
    spec = METRICS.get(name.partition("@")[0])
    return metric["variant"], "" if spec is not None and spec.reference == "none" else entry["reference_sha256"]


def _told(run: Run, protocol: tuple[str, str]) -> str:
    variant, sha = protocol
    about = run.results["reference"]
    known = f" ({about['dataset']})" if about.get("sha256") == sha else ""
    return f"{variant} against reference {sha[:12]}{known}" if sha else variant


def check_one_protocol(runs: Sequence[Run]) -> None:
    """InputError, naming both protocols and runs, where a metric has another variant or reference in two of them."""
    first: dict[str, tuple[Run, tuple[str, str]]] = {}
    for run in runs:
        for entry in run.entries:
            for name, metric in entry["metrics"].items():
                ours = _protocol(name, entry, metric)
                other, theirs = first.setdefault(name, (run, ours))
                if ours != theirs:
                    raise InputError(
                        "RUN",
                        f"{metric['title']} is {_told(other, theirs)} in {other.name}, and {_told(run, ours)} in {run.name}: "
                        "numbers of different protocols cannot stand in one column",
                    )


def labelled(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """Every entry, as a copy, its label preceded by its run's name where there are several."""
    found = [(run, copy.deepcopy(entry)) for run in runs for entry in run.entries]
    for run, entry in found:
        entry["label"] = f"{run.name}: {entry['label']}" if len(runs) > 1 else entry["label"]
    return found
