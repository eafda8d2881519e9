"""Options that several commands have. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit_eval.presets import PRESETS
from genkit_eval.settings import use_extractor, use_file, use_preset

PLACES = "a folder, .zip, .tar, .npz or .npy, or folder: imagenet: zip: tar: wds: npz: hf: with ?size=...&crop=...&n=..."

Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=use_file,
        help="YAML file of options: long names with _ for -, a list where one is repeated (num_samples: 50000, guidance: "
        "[none, CFG(3.0)]). The command line wins over it.",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        is_eager=True,
        callback=use_preset,
        help=f"A published protocol: {', '.join(PRESETS)}. It sets extractor, resize rule, metrics and, for run, images, labels "
        "and 8-bit rule; options given beside it win, and the results name them.",
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        help="A metric beside the standard ones or the preset's; NAME@PART over a further extractor. Repeat for several."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the run. An unfinished or smaller run in it goes on where it was.")]
Samples = Annotated[int, typer.Option(help="Images per guidance.")]
Steps = Annotated[int, typer.Option(help="Sampler steps.")]
Replicates = Annotated[int, typer.Option(help="Bootstrap resamples for the intervals; 0 for none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what another run left in --out.")]
ExtractorName = Annotated[
    str,
    typer.Option(
        callback=use_extractor,
        help="Feature network: builtin/cifar10, inception-2015, dinov2-vit-l-14 (s, b, g too), clip-vit-l-14-336, or "
        "package.module:factory; A+B for two in one pass.",
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH", help="Weights file of the extractor, NAME=PATH for each of several; default: fetched on first use."
    ),
]
Resize = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RULE", help="Resize rule, such as tf1 or clean, NAME=RULE for each of several; default the extractor's."
    ),
]
AnyWeights = Annotated[bool, typer.Option("--any-weights", help="Take a weights file with another hash, under another name.")]
Device = Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, ...")]
Size = Annotated[int | None, typer.Option(help="Bring images to this side first; default as stored.")]
Crop = Annotated[str | None, typer.Option(help="adm, center or none; default adm with --size, none without.")]
Count = Annotated[int | None, typer.Option(help="Use the first so many images; default all.")]
MaxErrors = Annotated[int, typer.Option(help="Unreadable files that may be left out.")]
BatchSize = Annotated[int, typer.Option(help="Images through the extractor at once.")]
Workers = Annotated[int | None, typer.Option(help="Decoding threads; default one for each core.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep features in $GENKIT_CACHE (~/.cache/genkit) and use them.")]
