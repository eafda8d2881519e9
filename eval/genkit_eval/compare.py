"""Two guidances beside each other: differences of every metric, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit_eval.errors import InputError
from genkit_eval.metrics.counts import interval
from genkit_eval.pareto import COSTS, value_of
from genkit_eval.runs import Run, read_run
from genkit_eval.score import LEVEL, difference
from genkit_eval.table import aligned, format_number, metric_order

#: What must agree for image k of one run to be the partner of image k of another.
SAME_IMAGES = ("seed", "labels", "label_rule", "class_names")


@dataclass(frozen=True)
class Side:
    """One guidance of one run."""

    run: Run
    entry: dict[str, Any]

    @property
    def label(self) -> str:
        """Run and guidance."""
        return f"{self.run.name}: {self.entry['label']}"


@dataclass(frozen=True)
class Change:
    """``second - first`` of one metric or cost; ``interval`` is None where there are no replicates to make it from."""

    name: str
    title: str
    variant: str
    better: str
    first: float
    second: float
    change: float
    interval: tuple[float, float] | None
    paired: bool

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval leaves out zero, else nothing."""
        if self.interval is None or self.better == "neither" or self.interval[0] <= 0 <= self.interval[1]:
            return ""
        return "better" if (self.change < 0) == (self.better == "lower") else "worse"


def why_unpaired(first: Side, second: Side) -> str | None:
    """Why the images of the two sides are not partners of each other; None where they are."""
    ours, theirs = (side.run.results["generation"] for side in (first, second))
    for key in SAME_IMAGES:
        if ours.get(key) is None or ours.get(key) != theirs.get(key):
            return "existing images have no known seeds" if ours.get(key) is None else f"{key.replace('_', ' ')} differ"
    if first.entry["n"] != second.entry["n"]:
        return f"sample counts differ ({first.entry['n']:,} and {second.entry['n']:,})"
    return None


def _unpaired(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float] | None:
    """Interval of the difference of two independent samples: every replicate of one with every one of the other."""
    if ours.get("replicates") is None or theirs.get("replicates") is None:
        return None
    first, second = (torch.tensor(side["replicates"], dtype=torch.float64) for side in (theirs, ours))
    spread: Tensor = (second[:, None] - first[None, :]).flatten()
    return interval(ours["value"] - theirs["value"], spread, LEVEL)


def _change(first: Side, second: Side, name: str, scores: Sequence[dict[str, Any]], pair: bool) -> Change:
    before, after = first.entry["metrics"][name], second.entry["metrics"][name]
    ours, theirs = scores[1].get(name, {}), scores[0].get(name, {})
    found = difference(ours, theirs) if pair and ours and theirs else None
    limits = tuple(found["interval"]) if found else _unpaired(ours, theirs)
    values = (before["value"], after["value"], after["value"] - before["value"])
    return Change(name, after["title"], after["variant"], after["better"], *values, limits, found is not None)


def check_protocols(first: Side, second: Side) -> None:
    """InputError, naming both, where a metric of both sides has another variant, or the references differ."""
    before, after = first.entry["metrics"], second.entry["metrics"]
    for name in metric_order(before.keys() & after.keys()):
        if before[name]["variant"] != after[name]["variant"]:
            raise InputError(
                "RUN",
                f"{after[name]['title']} is {before[name]['variant']} in {first.label} and {after[name]['variant']} in "
                f"{second.label}; numbers of different protocols cannot be compared",
            )
    if first.entry["reference_sha256"] != second.entry["reference_sha256"]:
        told = (f"{s.run.results['reference']['dataset']} ({s.entry['reference_sha256'][:12]})" for s in (first, second))
        raise InputError("RUN", f"the references are {' and '.join(told)}; only numbers against one reference can be compared")


def compare(first: Side, second: Side) -> list[Change]:
    """The changes of all metrics that both sides have, and of the costs.

    Paired where both were made from the same seeds and classes and resampled alike: the interval is of the mean of the
    differences, far shorter than that of two independent samples, which is given otherwise.
    """
    check_protocols(first, second)
    pair = why_unpaired(first, second) is None
    scores = [side.run.scores(side.entry) for side in (first, second)]
    names = metric_order(first.entry["metrics"].keys() & second.entry["metrics"].keys())
    found = [_change(first, second, name, scores, pair) for name in names]
    for name, (_, title) in COSTS.items():
        before, after = value_of(first.entry, name), value_of(second.entry, name)
        if before is not None and after is not None:
            found.append(Change(name, title, "", "lower", before, after, after - before, None, False))
    return found


def find_sides(text: str) -> list[Side]:
    """``RUN`` (all its guidances) or ``RUN:guidance`` (by label, expression or folder name)."""
    path, _, wanted = text, "", ""
    if not Path(path).exists():
        path, _, wanted = text.partition(":")
    run = read_run(Path(path))
    if not wanted:
        return [Side(run, entry) for entry in run.entries]
    same = " ".join(wanted.split())
    names = {same, _parsed(same)}
    found = [Side(run, entry) for entry in run.entries if names & {entry["label"], entry["guidance"], entry["slug"]}]
    if not found:
        known = ", ".join(entry["label"] for entry in run.entries)
        raise InputError("RUN", f"{path} has no guidance {wanted!r}; it has {known}")
    return found[:1]


def _parsed(text: str) -> str:
    from genkit.guidance import parse

    try:
        return repr(parse(text))
    except ValueError:
        return text


def pairs_of(first: str, second: str) -> list[tuple[Side, Side]]:
    """What to compare: one guidance with one, or the guidances that both runs have. InputError where there is nothing."""
    ours, theirs = find_sides(first), find_sides(second)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    if len(ours) == 1 or len(theirs) == 1:
        several = first if len(ours) > 1 else second
        labels = ", ".join(side.entry["label"] for side in (ours if len(ours) > 1 else theirs))
        raise InputError("RUN", f"{several} has several guidances; name one as {several}:guidance, of {labels}")
    found = [(a, b) for a in ours for b in theirs if a.entry["guidance"] == b.entry["guidance"]]
    if not found:
        raise InputError("RUN", f"{first} and {second} have no guidance in common; name one of each, RUN:guidance")
    return found


def text_of(first: Side, second: Side, changes: Sequence[Change]) -> str:
    """A table, and what kind of interval it has."""
    rows = [["", "first", "second", "change", "95 % interval", ""]]
    for c in changes:
        limits = "-" if c.interval is None else f"{c.interval[0]:+.3g} to {c.interval[1]:+.3g}"
        rows.append([c.title, format_number(c.first), format_number(c.second), f"{c.change:+.3g}", limits, c.verdict])
    reason = why_unpaired(first, second)
    if any(c.paired for c in changes):
        kind = "paired: both have the same seeds, classes and resamples"
    elif any(c.interval for c in changes):
        kind = (
            f"unpaired: {reason or 'reference, resamples or their number differ'}; intervals are wider than paired ones would be"
        )
    else:
        kind = "no intervals: there are no bootstrap replicates beside the results"
    return f"first:  {first.label}\nsecond: {second.label}\n\n{aligned(rows)}\n{kind}"


def as_dict(first: Side, second: Side, changes: Sequence[Change]) -> dict[str, Any]:
    """For JSON."""
    sides = {key: {"run": s.run.name, "guidance": s.entry["label"]} for key, s in (("first", first), ("second", second))}
    rows = [{**asdict(change), "verdict": change.verdict} for change in changes]
    return {**sides, "unpaired_because": why_unpaired(first, second), "changes": rows}
