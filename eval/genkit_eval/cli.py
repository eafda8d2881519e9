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
ExtractorName = Annotated[str, typer.Option(help="Feature network, or package.module:factory.")]
Weights = Annotated[Path | None, typer.Option(help="Weights file of the extractor; default: fetched on first use.")]
Resize = Annotated[str | None, typer.Option(help="Resize rule of the extractor, such as tf1 or clean; default its own.")]
AnyWeights = Annotated[bool, typer.Option("--any-weights", help="Take a weights file with another hash, under another name.")]
Device = Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, ...")]
Size = Annotated[int | None, typer.Option(help="Bring images to this side first; default as stored.")]
Crop = Annotated[str | None, typer.Option(help="adm, center or none; default adm with --size, none without.")]
Count = Annotated[int | None, typer.Option(help="Use the first so many images; default all.")]
MaxErrors = Annotated[int, typer.Option(help="Unreadable files that may be left out.")]
BatchSize = Annotated[int, typer.Option(help="Images through the extractor at once.")]
Workers = Annotated[int | None, typer.Option(help="Decoding threads; default one for each core.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep features in $GENKIT_CACHE (~/.cache/genkit) and use them.")]
PLACES = "a folder, .zip, .tar, .npz or .npy, or folder: imagenet: zip: tar: wds: npz: hf: with ?size=...&crop=...&n=..."

references = typer.Typer(help="Reference statistics: build, convert, show.", no_args_is_help=True, rich_markup_mode=None)
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
    model: Annotated[str, typer.Option(help="Built-in name or path to a .safetensors checkpoint.")] = "builtin/cifar10",
    num_samples: Samples = 2000,
    sampler: Annotated[
        str | None,
        typer.Option(help="Sampler name or expression (default heun); 'next_token(top_k=50)' for models that draw tokens."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps (default 18); models that draw tokens have their own.")] = None,
    seed: Annotated[int, typer.Option(help="Image k has seed SEED + k.")] = 0,
    labels: Annotated[
        str, typer.Option(help="Class of image k: 'balanced' (k mod C) or 'random' (hash of seed and k).")
    ] = "balanced",
    block_size: Annotated[int, typer.Option(help="Images generated at once and stored together.")] = 50,
    extractor: ExtractorName = "builtin/cifar10",
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    reference: Annotated[
        Path | None, typer.Option(help="Reference statistics (.safetensors); default: the extractor's own.")
    ] = None,
    bootstrap: Replicates = 200,
    device: Device = "cpu",
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
            weights,
            resize,
            any_weights,
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
def score(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help=f"Sets of images: {PLACES}.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; sets scored before stay in it.")],
    reference: Annotated[
        Path | None, typer.Option(help="Reference (.safetensors, .npz, .pkl, .pt); default: the extractor's own.")
    ] = None,
    extractor: ExtractorName = "builtin/cifar10",
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    name: Annotated[list[str] | None, typer.Option(help="What a set is called, in order; default its place.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric beside the standard ones. Repeat for several.")] = None,
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
    run_score(ScoreOptions(images, out, reference, network, looking, name or [], metric or [], bootstrap, overwrite))


@references.command()
def build(
    source: Annotated[str, typer.Argument(help=f"Images: {PLACES}.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .npz as ADM's evaluator reads it.")],
    extractor: ExtractorName = "builtin/cifar10",
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    dataset: Annotated[str | None, typer.Option(help="What the images are, for the results; default their place.")] = None,
    num_features: Annotated[
        int, typer.Option(help="Rows of features stored for precision and recall (a random sample).")
    ] = 10_000,
    keep_images: Annotated[int, typer.Option(help="Images stored too, as arr_0 for ADM's evaluator.")] = 0,
    size: Size = None,
    crop: Crop = None,
    num_images: Count = None,
    max_errors: MaxErrors = 0,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    cache: Cache = True,
    device: Device = "cpu",
) -> None:
    """Statistics of images into a reference file."""
    from genkit_eval.commands.reference import run_build
    from genkit_eval.commands.work import Looking, Network

    looking = Looking(size, crop, num_images, max_errors, batch_size, workers, cache)
    run_build(source, out, Network(extractor, weights, resize, device, any_weights), looking, num_features, keep_images, dataset)


@references.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A reference: .safetensors, or of ADM, pytorch-fid, EDM2, ...")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .npz as ADM's evaluator reads it.")],
    extractor: Annotated[str | None, typer.Option(help="Network that IN was made with; other tools do not say.")] = None,
    weights: Weights = None,
    resize: Resize = None,
    any_weights: AnyWeights = False,
    num_images: Annotated[int | None, typer.Option(help="Images behind the statistics, where IN does not say.")] = None,
    dataset: Annotated[str | None, typer.Option(help="What the images are; default the name of IN.")] = None,
    entry: Annotated[str | None, typer.Option(help="Of an EDM2 pkl: fid or fd_dinov2.")] = None,
    keep_images: Annotated[int, typer.Option(help="Images of arr_0 to keep.")] = 0,
    batch_size: BatchSize = 64,
    cache: Cache = True,
    device: Device = "cpu",
) -> None:
    """A reference of another tool into ours, or ours into ADM's npz. Pickles are read without executing any of them."""
    from genkit_eval.commands.reference import Said, run_convert
    from genkit_eval.commands.work import Looking, Network

    network = None if extractor is None else Network(extractor, weights, resize, device, any_weights)
    said = Said(num_images, dataset, entry, keep_images)
    run_convert(source, out, network, Looking(batch_size=batch_size, cache=cache), said)


@references.command()
def show(
    file: Annotated[Path, typer.Argument(help="A reference file of any tool.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What is inside a reference file."""
    from genkit_eval.commands.reference import run_show

    run_show(file, as_json)


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
