"""``genkit-eval reference``: its commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit_eval.options import (
    PLACES,
    AnyWeights,
    BatchSize,
    Cache,
    Count,
    Crop,
    Device,
    ExtractorName,
    MaxErrors,
    Resize,
    Size,
    Weights,
    Workers,
)

references = typer.Typer(help="Reference statistics: build, convert, show.", no_args_is_help=True, rich_markup_mode=None)


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
