"""What ``genkit-eval run`` does between reading its options and printing the table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from genkit_eval import provenance
from genkit_eval.config import KEEP_IMAGES, RunConfig
from genkit_eval.diffusers_classes import of_classes
from genkit_eval.distributed import world
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor, load_extractor
from genkit_eval.extractors.quantise import UINT8_RULES
from genkit_eval.extractors.weights import cache_folder
from genkit_eval.files import check_writable
from genkit_eval.generate import options_of
from genkit_eval.labels import check_classes, read_labels
from genkit_eval.presets import check_reference, find_preset
from genkit_eval.protocols import Pipeline
from genkit_eval.references import Reference, Work, load_reference
from genkit_eval.report import check_installed
from genkit_eval.run import Request, blocks_done, check_shape, compare_sheet, make_config, run
from genkit_eval.score import Bootstrap
from genkit_eval.selection import Metrics, metrics_of
from genkit_eval.table import text_table

#: Five guidances of one strength, for a first look. The interval is the one that Kynkaanniemi et al. 2024 use for ImageNet-512.
QUICKSTART = ("none", "CFG(3.0)", "Interval(CFG(3.0), 0.28, 5.42)", "APG(3.0)", "Adaptive(CFG(3.0), 0.995, measure='x0')")
SEED_LIMIT = 2**31


@dataclass(frozen=True)
class RunOptions:
    """The options of ``genkit-eval run``, as typed. ``config`` is the file that some of them came from.

    ``tolerant`` is of sweeps: guidances that the model refuses are left out.
    """

    guidance: list[str]
    out: Path
    model: str = "builtin/cifar10"
    num_samples: int = 2000
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    labels: str = "balanced"
    block_size: int = 50
    extractor: str = "builtin/cifar10"
    reference: Path | None = None
    bootstrap: int = 200
    device: str = "cpu"
    overwrite: bool = False
    weights: list[str] | None = None
    resize: list[str] | None = None
    any_weights: bool = False
    metric: list[str] | None = None
    keep_images: int = KEEP_IMAGES
    uint8: str | None = None
    preset: str | None = None
    config: Path | None = None
    tolerant: bool = False

    @property
    def metrics(self) -> Metrics:
        """What is computed: of a preset its own metrics, else the standard ones; and those asked for by name."""
        return metrics_of(self.preset, self.metric)

    def protocol(self) -> dict[str, Any]:
        """For the results: the preset and what was changed of it; empty without one."""
        return {} if self.preset is None else find_preset(self.preset).as_dict(vars(self))

    def request(self) -> Request:
        """What is asked of a run. InputError for a guidance, a count or a metric that does not work."""
        self.metrics.check()
        guidances, bootstrap = parse_guidances(self.guidance), Bootstrap(self.bootstrap)
        return Request(
            guidances, self.num_samples, self.out, bootstrap, self.overwrite, True, self.device, self.metrics, self.tolerant
        )

    def check(self) -> None:
        """InputError for a number out of range or an unknown rule."""
        _at_least("--steps", 1 if self.steps is None else self.steps, 1)
        _at_least("--block-size", self.block_size, 1)
        _at_least("--bootstrap", self.bootstrap, 0)
        _at_least("--keep-images", self.keep_images, 0)
        if not 0 <= self.seed < SEED_LIMIT:
            raise InputError("--seed", f"got {self.seed}; 0 to {SEED_LIMIT - 1} works")
        if self.bootstrap == 1:
            raise InputError("--bootstrap", "got 1; an interval needs at least 2 resamples, 200 is usual, 0 is none")
        if self.uint8 is not None and self.uint8 not in UINT8_RULES:
            raise InputError("--uint8", f"got {self.uint8!r}; one of {', '.join(UINT8_RULES)} works")
        read_labels(self.labels, self.num_samples)
        if self.preset is not None:
            find_preset(self.preset)


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(option, f"got {value}; {least} or more works")


def parse_guidances(texts: list[str]) -> tuple[tuple[str, Any], ...]:
    """(text, object) pairs; the text is parsed into registered classes and never run. InputError for anything else."""
    from genkit.guidance import parse

    found = []
    for text in texts:
        try:
            found.append((" ".join(text.split()), parse(text)))
        except ValueError as error:
            raise InputError("--guidance", str(error)) from None
    return tuple(found)


def settle_sampler(pipe: Pipeline, sampler: str | None, steps: int | None) -> tuple[str, int]:
    """Sampler and steps: as asked, or else the pipeline's own or usual ones, or heun in 18. InputError for what it cannot do."""
    from genkit.samplers.diffusion import find_sampler

    own: str | None = getattr(pipe, "sampler", None)
    usual, usual_steps = getattr(pipe, "usual", ("heun", 18))
    length: int = usual_steps if own is None else pipe.steps  # type: ignore[attr-defined]  # those that have one sampler have both
    if own is not None and steps not in (None, length):
        raise InputError("--steps", f"{pipe.name} draws images in {length} steps; leave it out")
    chosen, count = (own or usual) if sampler is None else sampler, length if steps is None else steps
    try:
        if own is None and chosen != usual:
            find_sampler(chosen)
        options_of(pipe, chosen, count)
    except ValueError as error:
        raise InputError("--sampler", str(error)) from None
    return chosen, count


def check_device(device: str) -> None:
    """InputError for a device that torch does not have."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError("--device", f"{device!r} cannot be used here ({str(error).splitlines()[0]}); cpu works") from None


def load_pipeline(model: str, device: str) -> Pipeline:
    """The pipeline; InputError when there is none under that name or its weights are damaged."""
    import genkit

    try:
        found = genkit.load(model, device=device)
        pipe: Pipeline = found if hasattr(found, "num_classes") else of_classes(found, model)
    except (ImportError, OSError, ValueError) as error:
        raise InputError("--model", str(error)) from None
    if not pipe.num_classes:
        raise InputError("--model", f"{pipe.name} takes text; only models of classes work")
    return pipe


@dataclass(frozen=True)
class Loaded:
    """What the images of a run are made and scored with."""

    pipe: Pipeline
    extractor: Extractor
    reference: Reference
    config: RunConfig


def load(options: RunOptions) -> Loaded:
    """Everything that guidances of one folder share; InputError for whatever does not work."""
    check_device(options.device)
    check_writable(options.out)
    extractor = load_extractor(options.extractor, options.device, options.weights, options.resize, options.any_weights)
    options.metrics.specs(extractor)
    check_reference(options.preset, options.reference, extractor.reference)
    reference = load_reference(options.reference, extractor, Work(cache_folder()))
    pipe = load_pipeline(options.model, options.device)
    check_shape(pipe, extractor)
    sampler, steps = settle_sampler(pipe, options.sampler, options.steps)
    labels, classes = read_labels(options.labels, options.num_samples)
    check_classes(classes, pipe.num_classes)
    config = make_config(
        pipe,
        extractor,
        sampler,
        steps,
        options.seed,
        labels,
        options.block_size,
        options.uint8,
        classes,
        options.protocol(),
        options.keep_images,
    )
    return Loaded(pipe, extractor, reference, config)


def execute(options: RunOptions) -> list[str]:
    """Check every option, then run, print the table and write the report; returns why guidances were left out, if any were.

    Ctrl-C says how to go on and exits with 130.
    """
    check_installed()
    options.check()
    request = options.request()
    with world().ahead():
        loaded = load(options)
    pipe, extractor, reference, config = loaded.pipe, loaded.extractor, loaded.reference, loaded.config
    try:
        if not options.overwrite:
            done, total = blocks_done(config, request)
            if done:
                print(f"{done} of {total} blocks are there already", file=sys.stderr)
        found = run(pipe, extractor, reference, config, request)
        if world().first:
            finish(options.out, found)
    except KeyboardInterrupt:
        done, total = blocks_done(config, request)
        again = provenance.command(extra_remove=("--overwrite",))
        print(f"\ninterrupted: {done} of {total} blocks are finished and kept. Go on with:\n  {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    left_out: list[str] = found.get("left_out", [])
    return left_out


def finish(out: Path, found: dict[str, Any]) -> None:
    """Write the comparison sheet and the report, and print the table."""
    from genkit_eval.report.build import build_report, shown_of

    entries = found["guidances"]
    compare_sheet(out, {"guidances": [entry for entry, shown in zip(entries, shown_of(entries), strict=True) if shown]})
    page = build_report(out)
    print(text_table(found))
    for warning in found["warnings"]:
        print(f"note: {warning}")
    print(f"\nreport:  {page}\nresults: {out / 'results.json'}")
