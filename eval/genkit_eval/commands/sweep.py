"""``genkit-eval sweep`` and ``tune``: many guidances from a template, on the same seeds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Templates = Annotated[
    list[str], typer.Option(help="Guidance with named values, e.g. 'Interval(CFG({w}), {lo}, {hi})'. Repeat for several.")
]
Objectives = Annotated[
    list[str] | None,
    typer.Option(help="What is weighed: a metric, nfe or seconds. Repeat for several; default frechet, recall, nfe."),
]


def sweep(
    guidance: Templates,
    grid: Annotated[
        list[str] | None, typer.Option(help="Values of a name: w=1:4:0.5 (start:stop:step) or lo=0.1,0.28. Repeat for several.")
    ] = None,
    objective: Objectives = None,
    **options: Any,
) -> None:
    """Run every combination of named values on the same seeds; ends with the Pareto front. Goes on where it was stopped."""
    from genkit_eval.search.sweep import run_sweep

    run_sweep(guidance, grid or [], objective, options)


def tune(
    guidance: Annotated[str, typer.Option(help="Guidance with named values, e.g. 'Interval(CFG({w}), {lo}, {hi})'.")],
    range_: Annotated[
        list[str],
        typer.Option("--range", help="Values of a name: w=1:8, lo=0.01:1:log, n=1:4:int or shape=linear,cosine. One for each."),
    ],
    budget: Annotated[str, typer.Option(help="What may be spent: network evaluations of images (2e6), or '20000 images'.")],
    objective: Objectives = None,
    **options: Any,
) -> None:
    """Find values that trade distance, recall and cost best, within a budget. Goes on where it was stopped."""
    from genkit_eval.search.tune import run_tune

    run_tune(guidance, range_, budget, objective, options)
