"""A sweep: a run over every combination of a grid, and the Pareto front of what came out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from genkit_eval.command import RunOptions, execute
from genkit_eval.distributed import world
from genkit_eval.errors import InputError
from genkit_eval.metrics import METRICS
from genkit_eval.pareto import COSTS, USUAL, best_first, known, title_of
from genkit_eval.runs import read_run
from genkit_eval.search.templates import expand
from genkit_eval.selection import Metrics
from genkit_eval.table import text_table


def better_by_name(name: str) -> str:
    """``lower`` or ``higher``; ``neither`` for an unknown name, and for what is only described."""
    spec = METRICS.get(name.partition("@")[0])
    return "lower" if name in COSTS else "neither" if spec is None else spec.better


def objectives_of(names: Sequence[str] | None, metrics: Metrics) -> tuple[str, ...]:
    """The objectives as asked, or of the usual ones those that are computed.

    Raises InputError for an unknown name, for one that has no better and worse, and for one that is not among ``metrics``.
    """
    for name in names or ():
        if better_by_name(name) == "neither":
            choice = [*(n for n, spec in METRICS.items() if spec.better != "neither"), *COSTS]
            raise InputError("--objective", f"got {name!r}; one of {', '.join(choice)} works")
        if not (name in COSTS or metrics.has(name)):
            raise InputError("--objective", f"{name} is not computed; --metric {name} beside it works")
    return tuple(dict.fromkeys(names or (name for name in USUAL if name in COSTS or metrics.has(name))))


def front_text(entries: Sequence[dict[str, Any]], objectives: Sequence[str]) -> str:
    """The Pareto front as a table, by the first objective that all entries have."""
    names = known(entries, objectives)
    if not names:
        raise InputError("--objective", f"the results have no {', '.join(objectives)}")
    best = best_first(entries, names)
    titles = ", ".join(title_of(entries, name) for name in names)
    return f"Pareto front ({titles}): {len(best)} of {len(entries)}\n{text_table({'guidances': best})}"


def run_sweep(templates: Sequence[str], grids: Sequence[str], objectives: Sequence[str] | None, options: dict[str, Any]) -> None:
    """Run every combination that its guidance and the model take, print the table and the front.

    A combination that the model refuses or diverges with is left out, and said; the others go on.
    """
    found = expand(templates, grids)
    asked = RunOptions([text for text, _ in found.guidances], **options, tolerant=True)
    wanted = objectives_of(objectives, asked.metrics)
    print(found.summary(), file=sys.stderr)
    left_out = execute(asked)
    if world().first:
        told = [f"left out: {reason}" for reason in left_out]
        print("\n".join([*told, "", front_text(read_run(asked.out).entries, wanted)]))
