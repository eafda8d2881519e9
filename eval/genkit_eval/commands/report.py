"""``genkit-eval report`` and ``compare``: finished runs as a page or tables, and two guidances beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or their results.json.")],
    html: Annotated[Path | None, typer.Option(help="Page to write; default of one run its report.html.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write, with every digit.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Table to write, as a tabular for papers.")] = None,
) -> None:
    """Report finished runs: one again, or several merged, where their numbers follow the same protocols."""
    from genkit_eval.report import check_installed

    check_installed()
    from genkit_eval.errors import InputError
    from genkit_eval.files import check_writable, write_bytes
    from genkit_eval.report.build import render
    from genkit_eval.report.export import to_csv, to_latex
    from genkit_eval.runs import check_one_protocol, labelled, read_runs
    from genkit_eval.table import text_table

    found = read_runs(runs)
    check_one_protocol(found)
    if html is csv is latex is None and len(runs) == 1 and runs[0].is_dir():
        html = runs[0] / "report.html"
    for option, path, make in (("--html", html, render), ("--csv", csv, to_csv), ("--latex", latex, to_latex)):
        if path is not None:
            if path.is_dir():
                raise InputError(option, f"{path} is a folder; the name of a file works")
            check_writable(path.parent, option)
            write_bytes(path, make(found).encode())
            typer.echo(f"{'report' if option == '--html' else option.removeprefix('--')}: {path}")
    if len(runs) > 1 or html is csv is latex is None:
        typer.echo(text_table({"guidances": [entry for _, entry in labelled(found)]}))


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN[:GUIDANCE]", help="A finished run, and which of its guidances.")],
    second: Annotated[str, typer.Argument(metavar="RUN[:GUIDANCE]", help="What is compared with it.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Differences of every metric, second less first, with 95 % intervals: paired where seeds and resamples are the same."""
    import json

    from genkit_eval.compare import as_dict, pairs_of, text_of
    from genkit_eval.compare import compare as changes_of

    pairs = [(a, b, changes_of(a, b)) for a, b in pairs_of(first, second)]
    if as_json:
        typer.echo(json.dumps([as_dict(*pair) for pair in pairs], indent=1))
    else:
        typer.echo("\n\n".join(text_of(*pair) for pair in pairs))
