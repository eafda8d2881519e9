"""``genkit-eval doctor``: what may be wrong with this machine, before it costs numbers."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    device: Annotated[str, typer.Option(help="Where networks would run: cpu, cuda, ...")] = "cpu",
    model: Annotated[str, typer.Option(help="What the self-test generates with.")] = "builtin/cifar10",
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-tests, which make a few images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check weights, versions, device, threads and cache, and that results can be repeated. Exit code 1 if something is wrong."""
    from genkit_eval.doctor import run_doctor

    raise typer.Exit(run_doctor(device, model, quick, as_json))
