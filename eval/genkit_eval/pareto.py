"""What several entries of results trade against each other, and those that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: What guidances are usually weighed by: Frechet distance, recall, network evaluations.
USUAL = ("frechet", "recall", "nfe")
#: Costs of an entry, by the name they go by as objectives.
COSTS = {"nfe": ("nfe_mean", "NFE"), "seconds": ("seconds_wall", "s/image")}


def value_of(entry: dict[str, Any], name: str) -> float | None:
    """A metric or cost of an entry; None where it has none."""
    if name in COSTS:
        cost = entry.get("cost")
        return None if cost is None else float(cost[COSTS[name][0]])
    metric = entry["metrics"].get(name)
    return None if metric is None else float(metric["value"])


def title_of(entries: Sequence[dict[str, Any]], name: str) -> str:
    """How a metric or cost is headed."""
    return COSTS[name][1] if name in COSTS else str(next(e["metrics"][name]["title"] for e in entries if name in e["metrics"]))


def better_of(entries: Sequence[dict[str, Any]], name: str) -> str:
    """``lower`` or ``higher``; ``neither`` for what is only described."""
    return "lower" if name in COSTS else str(next(e["metrics"][name]["better"] for e in entries if name in e["metrics"]))


def known(entries: Sequence[dict[str, Any]], names: Sequence[str] = USUAL) -> tuple[str, ...]:
    """Those of ``names`` that every entry has a value of."""
    return tuple(name for name in names if all(value_of(entry, name) is not None for entry in entries))


def front(entries: Sequence[dict[str, Any]], names: Sequence[str] = USUAL) -> list[bool]:
    """Whether each entry is on the Pareto front: no other one is at least as good in all of ``names`` and better in one.

    Of equal entries all are on it. An entry without a value of each of ``names`` is not.
    """
    signs = np.array([-1.0 if better_of(entries, name) == "higher" else 1.0 for name in names])
    values = [[value_of(entry, name) for name in names] for entry in entries]
    whole = [None not in row for row in values]
    found = [signs * row if good else np.full(len(names), np.inf) for row, good in zip(values, whole, strict=True)]
    table = np.array(found, dtype=float).reshape(len(found), len(names))
    beaten = [bool(((table <= row).all(1) & (table < row).any(1)).any()) for row in table]
    return [good and not worse for good, worse in zip(whole, beaten, strict=True)]


def best_first(entries: Sequence[dict[str, Any]], names: Sequence[str] = USUAL) -> list[dict[str, Any]]:
    """The entries on the front, by the first of ``names``."""
    chosen = [entry for entry, on in zip(entries, front(entries, names), strict=True) if on]
    return sorted(chosen, key=lambda entry: value_of(entry, names[0]) or 0.0, reverse=better_of(entries, names[0]) == "higher")
