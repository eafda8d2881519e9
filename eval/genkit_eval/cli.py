"""The ``genkit-eval`` command. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from genkit_eval.errors import InputError

app = typer.Typer(
    name="genkit-eval",
    help="Generate images with several guidances on the same seeds, score them, and report.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder of the run. An unfinished or smaller run in it goes on where it was.")]
Samples = Annotated[int, typer.Option(help="Images per guidance.")]
Steps = Annotated[int, typer.Option(help="Sampler steps.")]
Replicates = Annotated[int, typer.Option(help="Bootstrap resamples for the intervals; 0 for none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what another run left in --out.")]


def _version(value: bool) -> None:
    if value:
        from genkit_eval.provenance import genkit_version

        typer.echo(f"genkit-eval {genkit_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Generate images with several guidances on the same seeds, score them, and report."""


@app.command()
def run(
    guidance: Annotated[
        list[str], typer.Option(help="Guidance expression, e.g. 'Interval(APG(4.0), 0.28, 5.42)'. Repeat for several.")
    ],
    out: Out,
    model: Annotated[str, typer.Option(help="Built-in name or path to a .safetensors checkpoint.")] = "builtin/cifar10",
    num_samples: Samples = 2000,
    sampler: Annotated[str, typer.Option(help="Sampler name or expression.")] = "heun",
    steps: Steps = 18,
    seed: Annotated[int, typer.Option(help="Image k has seed SEED + k.")] = 0,
    labels: Annotated[
        str, typer.Option(help="Class of image k: 'balanced' (k mod C) or 'random' (hash of seed and k).")
    ] = "balanced",
    block_size: Annotated[int, typer.Option(help="Images generated at once and stored together.")] = 50,
    extractor: Annotated[str, typer.Option(help="Feature network.")] = "builtin/cifar10",
    reference: Annotated[
        Path | None, typer.Option(help="Reference statistics (.safetensors); default: the extractor's own.")
    ] = None,
    bootstrap: Replicates = 200,
    device: Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, ...")] = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Generate, score and report one or more guidances."""
    from genkit_eval.command import RunOptions, execute

    execute(
        RunOptions(
            guidance,
            out,
            model,
            num_samples,
            sampler,
            steps,
            seed,
            labels,
            block_size,
            extractor,
            reference,
            bootstrap,
            device,
            overwrite,
        )
    )


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    num_samples: Samples = 1000,
    steps: Steps = 10,
    bootstrap: Replicates = 200,
    overwrite: Overwrite = False,
) -> None:
    """Compare five guidances of one strength with the built-in model: a few minutes on two cores, no download."""
    from dataclasses import replace

    from genkit_eval.command import QUICKSTART, RunOptions, execute

    options = RunOptions(list(QUICKSTART), out, num_samples=num_samples, sampler="dpmpp_2m", steps=steps, block_size=100)
    execute(replace(options, bootstrap=bootstrap, overwrite=overwrite))


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders written by 'genkit-eval run'.")]) -> None:
    """Rebuild report.html of finished runs from their results.json."""
    from genkit_eval.report import check_installed

    check_installed()
    from genkit_eval.report.build import build_report

    for folder in runs:
        typer.echo(f"report: {build_report(folder)}")


@app.command()
def guidances() -> None:
    """List the guidance methods, those of installed plug-ins too, with their arguments and an example."""
    from genkit.guidance import registry
    from genkit.guidance.base import signature

    for name, cls in sorted(registry().items()):
        about = (cls.__doc__ or "").strip().splitlines()
        typer.echo(f"{signature(cls) if name != 'NoGuidance' else 'none'}")
        typer.echo(f"    {about[0] if about else ''}")
        if cls.examples:
            typer.echo(f"    for example {cls.examples[0]}")


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0 when done, 2 for input that does not work (one line says what would), 130 when interrupted."""
    sys.exit(invoke(sys.argv[1:] if args is None else args))


def invoke(args: list[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        outcome: Any = typer.main.get_command(app).main(args, prog_name="genkit-eval", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (InputError, KeyboardInterrupt) as error:
        return _fail(str(error), 2) if isinstance(error, InputError) else _fail("interrupted", 130)
    except OSError as error:
        # A disk that filled up or a folder that vanished while at work: nothing a traceback would explain better.
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}; what is finished is kept, the same command goes on from there", 2)
    except typer.Abort:
        return _fail("interrupted", 130)
    except Exception as error:
        # typer's usage errors: their base class has moved between versions, this method has not.
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        return _fail(text, 2) if text else 2


def _fail(message: str, code: int) -> int:
    print(f"genkit-eval: {' '.join(message.split())}", file=sys.stderr)
    return code
