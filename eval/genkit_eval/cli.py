"""The ``genkit-eval`` command. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from genkit_eval.commands.doctor import doctor
from genkit_eval.commands.export import export
from genkit_eval.commands.like import like
from genkit_eval.commands.reference_options import references
from genkit_eval.commands.report import compare, report
from genkit_eval.commands.sweep import sweep, tune
from genkit_eval.distributed import complain, together
from genkit_eval.errors import InputError
from genkit_eval.options import (
    PLACES,
    AnyWeights,
    BatchSize,
    Cache,
    Config,
    Count,
    Crop,
    Device,
    ExtractorName,
    MaxErrors,
    Metric,
    Out,
    Overwrite,
    PresetName,
    Replicates,
    Resize,
    Samples,
    Size,
    Steps,
    Weights,
    Workers,
)

app = typer.Typer(
    name="genkit-eval",
    help="Generate images with several guidances on the same seeds, score them, and report.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(references, name="reference")


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
    model: Annotated[
        str, typer.Option(help="Built-in name, .safetensors checkpoint, folder of a diffusers pipeline of classes, or hub id.")
    ] = "builtin/cifar10",
    config: Config = None,
    preset: PresetName = None,
    num_samples: Samples = 2000,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler name or expression (default heun; of a diffusers pipeline its own scheduler); "
            "'next_token(top_k=50)' for models that draw tokens."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampler steps (default 18, diffusers pipelines 50); models that draw tokens: their own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image k has seed SEED + k.")] = 0,
    labels: Annotated[
        str,
        typer.Option(
            help="Class of image k: balanced (k mod C), random (hash of seed and k), sorted (k C / N), or file:PATH (line k)."
        ),
    ] = "balanced",
    uint8: Annotated[
        str | None,
        typer.Option(help="Rule for 8 bits: adm-floor, edm, half-up or half-even; default the model's own. Recorded."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Images generated at once and stored together.")] = 50,
    extractor: ExtractorName = "builtin/cifar10",
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    reference: Annotated[
        Path | None, typer.Option(help="Reference statistics (.safetensors, .npz, .pkl, .pt); default: the extractor's own.")
    ] = None,
    metric: Metric = None,
    keep_images: Annotated[
        int, typer.Option(help="Images per guidance whose pixels are stored, for pictures; of the others, features are.")
    ] = 256,
    bootstrap: Replicates = 200,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Generate, score and report one or more guidances."""
    given = dict(locals())
    from genkit_eval.command import RunOptions, execute

    execute(RunOptions(**given))


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
def score(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help=f"Sets of images: {PLACES}.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; sets scored before stay in it.")],
    config: Config = None,
    preset: PresetName = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference (.safetensors, .npz, .pkl, .pt); default: the extractor's own.")
    ] = None,
    extractor: ExtractorName = "builtin/cifar10",
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    name: Annotated[list[str] | None, typer.Option(help="What a set is called, in order; default its place.")] = None,
    metric: Metric = None,
    size: Size = None,
    crop: Crop = None,
    num_images: Count = None,
    max_errors: MaxErrors = 0,
    bootstrap: Replicates = 200,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    cache: Cache = True,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Score existing images against a reference and report."""
    from genkit_eval.commands.score import ScoreOptions, run_score
    from genkit_eval.commands.work import Looking, Network

    network = Network(extractor, weights, resize, device, any_weights)
    looking = Looking(size, crop, num_images, max_errors, batch_size, workers, cache)
    options = ScoreOptions(images, out, reference, network, looking, name or [], metric or [], bootstrap, overwrite, preset)
    run_score(options)


app.command()(like(run)(sweep))
app.command()(like(run)(tune))
app.command()(report)
app.command()(compare)
app.command()(export)
app.command()(doctor)


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
    sys.exit(together(lambda: invoke(sys.argv[1:] if args is None else args)))


def invoke(args: list[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        outcome: Any = typer.main.get_command(app).main(args, prog_name="genkit-eval", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (InputError, KeyboardInterrupt) as error:
        return _fail(str(error), error.code) if isinstance(error, InputError) else _fail("interrupted", 130)
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
    return complain(" ".join(message.split()), code)
