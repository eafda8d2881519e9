"""``genkit-eval export``: the images of a run as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[str, typer.Argument(metavar="RUN[:GUIDANCE]", help="A finished run, and which of its guidances.")],
    to: Annotated[Path, typer.Option(help="An .npz (ADM's arr_0 and arr_1), a .zip, or a new folder of PNGs by class.")],
) -> None:
    """Write the images that a run has kept (--keep-images) to files that other tools read."""
    from genkit_eval.compare import find_sides
    from genkit_eval.errors import InputError
    from genkit_eval.pictures import export as write

    sides = find_sides(run)
    if len(sides) > 1:
        labels = ", ".join(side.entry["label"] for side in sides)
        raise InputError("RUN", f"{run} has several guidances; name one as {run}:guidance, of {labels}")
    count, total = write(sides[0], to)
    typer.echo(f"{count:,} of {total:,} images: {to}")
    if count < total:
        typer.echo(f"note: of the others no pixels were kept; run --keep-images {total} --overwrite keeps them all")
