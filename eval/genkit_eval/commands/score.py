"""What ``genkit-eval score`` does: existing images against a reference, with the same numbers, files and report as a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from genkit_eval import provenance, results
from genkit_eval.commands.work import Looking, Network
from genkit_eval.config import RunConfig, slug
from genkit_eval.distributed import world
from genkit_eval.entries import Scoring, describe
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.files import check_writable, write_bytes
from genkit_eval.images import Images, View
from genkit_eval.metrics import Sample
from genkit_eval.metrics.registry import PIXEL_LAYER
from genkit_eval.presets import check_reference, find_preset
from genkit_eval.references import Work, load_reference
from genkit_eval.references.contents import MAIN
from genkit_eval.references.features import key_of
from genkit_eval.report import check_installed
from genkit_eval.report.grid import COLUMNS, labelled_rows, png_bytes
from genkit_eval.run import common_header, prepare_folder
from genkit_eval.score import MIN_SAMPLES, Bootstrap
from genkit_eval.selection import Metrics, metrics_of
from genkit_eval.table import text_table

FOUND = "existing images"
NOT_KNOWN = "not known"
ROWS, THUMBNAIL = 8, 64


@dataclass(frozen=True)
class ScoreOptions:
    """The options of ``genkit-eval score``, as typed; ``names`` are what the sets are called, default their places."""

    images: list[str]
    out: Path
    reference: Path | None = None
    network: Network = field(default_factory=Network)
    looking: Looking = field(default_factory=Looking)
    names: list[str] = field(default_factory=list)
    metric: list[str] = field(default_factory=list)
    bootstrap: int = 200
    overwrite: bool = False
    preset: str | None = None

    @property
    def metrics(self) -> Metrics:
        """What is computed: of a preset its own metrics, else the standard ones; and those asked for by name."""
        return metrics_of(self.preset, self.metric)

    def protocol(self, images: int) -> dict[str, Any]:
        """For the results: the preset and what was changed of it, of so many images; empty without one."""
        used = {"extractor": self.network.name, "resize": self.network.resize, "num_samples": images}
        return {} if self.preset is None else {"preset": find_preset(self.preset).as_dict(used)}

    def check(self) -> None:
        """InputError for a number out of range, an unknown metric, and names that do not fit the images."""
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise InputError("--bootstrap", f"got {self.bootstrap}; 200 is usual, 0 is none")
        if self.names and len(self.names) != len(self.images):
            raise InputError("--name", f"got {len(self.names)} for {len(self.images)} sets of images; one for each works")
        if len(set(self.images)) < len(self.images):
            raise InputError("IMAGES", "the same set is given twice")
        self.metrics.check()


def sample_from(images: Images, extractor: Extractor, work: Work, metrics: Metrics) -> tuple[Sample, list[str]]:
    """Images as the metrics see them, with the layers that these read, and what a reader must know of them."""
    wanted = {MAIN, *(layer for spec, _ in metrics.specs(extractor).values() for layer in spec.inputs)}
    layers: dict[str, list[Tensor]] = {}
    positions: list[int] = []
    features = work.features(images, extractor)
    for rows in features:
        positions += rows.positions
        for name, values in rows.layers.items():
            if name in wanted or name.startswith(PIXEL_LAYER):
                layers.setdefault(name, []).append(values)
    if len(positions) < MIN_SAMPLES:
        raise InputError(images.option, f"{images.uri} has {len(positions)} readable images; at least {MIN_SAMPLES} work")
    joined = {name: torch.cat(parts) for name, parts in layers.items()}
    labels = images.labels(positions)
    main = joined.pop(MAIN)
    return Sample(main, layers=joined, labels=None if labels is None else torch.tensor(labels)), features.problems.lines()


def grid(images: Images) -> bytes:
    """A few images, made small: of the first classes where there are classes, else the first ones. A PNG."""
    labels = images.labels(range(len(images)))
    rows: list[tuple[str, list[int]]] = []
    if labels is None:
        starts = range(0, min(len(images), ROWS * COLUMNS), COLUMNS)
        rows = [(str(start), list(range(start, min(start + COLUMNS, len(images))))) for start in starts]
    else:
        names = dict(enumerate(images.source.class_names))
        for label in sorted(set(labels))[:ROWS]:
            members = [k for k, found in enumerate(labels) if found == label][:COLUMNS]
            rows.append((names.get(label, str(label)), members))
    small = Images(images.source, View(THUMBNAIL, "center"), images.chosen)
    drawn = []
    for name, members in rows:
        pixels = [p for batch in small.batches(COLUMNS, members) for p in batch.pixels]
        if pixels:
            drawn.append((name, torch.stack(pixels)))
    return png_bytes(labelled_rows(drawn, scale=1))


def config_of(extractor: Extractor, view: View) -> RunConfig:
    """What all sets in one folder have in common."""
    return RunConfig(
        model=FOUND,
        model_sha256="none",
        sampler=NOT_KNOWN,
        steps=0,
        seed=0,
        labels="as found",
        block_size=0,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        uint8_rule=f"as stored; decoded by Pillow {PIL.__version__}; crop and size: {view}",
        genkit=provenance.genkit_version(),
    )


def generation(config: RunConfig) -> dict[str, Any]:
    """The part of the results file about how images were made; where they lie is in each entry."""
    return {
        "model": FOUND,
        "model_sha256": "not known",
        **dict.fromkeys(("sampler", "steps", "seed_rule", "label_rule"), NOT_KNOWN),
        "uint8_rule": config.uint8_rule,
    }


def _kept(out: Path, asked: set[str], scoring: Scoring) -> list[dict[str, Any]]:
    """Entries of earlier commands. InputError for one that was scored otherwise and is not asked for now."""
    entries = []
    for entry in results.earlier_entries(out):
        if scoring.agrees(entry):
            entries.append(entry)
        elif entry["slug"] not in asked:
            raise InputError(
                "--out",
                f"{out} holds scores of {entry['label']} with another --reference, --metric or --bootstrap; choose another "
                "folder, or --overwrite",
            )
    return entries


def expression_of(images: Images) -> str:
    """A text that is one for each content and view: it names the folder of an entry."""
    return f"{Path(images.uri).name} {images.view} {images.fingerprint[:12]}"


def run_score(options: ScoreOptions) -> dict[str, Any]:
    """Score every set, write results and report as a run does, print the table, and return the results.

    Of several processes, the first does all this, and the others make their share of the features and return nothing.
    """
    check_installed()
    options.check()
    sets = [options.looking.open(uri, "IMAGES") for uri in options.images]
    for images in sets:
        if len(images) < MIN_SAMPLES:
            raise InputError("IMAGES", f"{images.uri} has {len(images)} images; at least {MIN_SAMPLES} work")
    check_writable(options.out)
    with world().ahead():
        extractor, device = options.network.load(), options.network.device
    options.metrics.specs(extractor)
    check_reference(options.preset, options.reference, extractor.reference)
    if not world().first:
        return assist(sets, extractor, options)
    with options.looking.work(device, 0, "reference") as work:
        reference = load_reference(options.reference, extractor, work)
    scoring = Scoring(reference, Bootstrap(options.bootstrap), extractor, options.metrics)
    config = config_of(extractor, sets[0].view)
    prepare_folder(options.out, config, options.overwrite)
    about = common_header(extractor, reference, scoring.bootstrap, device) | {"generation": generation(config)}
    entries = _kept(options.out, {slug(expression_of(images)) for images in sets}, scoring)
    found: dict[str, Any] = {}
    notes: list[str] = []
    for number, (images, name) in enumerate(zip(sets, options.names or options.images, strict=True), start=1):
        with options.looking.work(device, len(images), name, spread=True) as work:
            fake, lines = sample_from(images, extractor, work, options.metrics)
        about |= options.protocol(len(fake))
        entry = describe(options.out, name, expression_of(images), key_of(images, extractor), fake, scoring)
        write_bytes(options.out / entry["grid"], grid(images))
        notes += [f"{name}: {line}" for line in lines]
        entries = results.replace_entry(entries, entry | {"images": images.as_dict(), "notes": lines})
        found = results.write_results(options.out, about, entries, complete=number == len(sets))
    finish(options.out, found, [*reference.notes, *notes])
    return found


def assist(sets: Sequence[Images], extractor: Extractor, options: ScoreOptions) -> dict[str, Any]:
    """What each process but the first does: its share of the features of every set."""
    for images in sets:
        with options.looking.work(options.network.device, len(images), images.uri, spread=True) as work:
            work.features(images, extractor)
    return {}


def finish(out: Path, found: dict[str, Any], notes: Sequence[str]) -> None:
    """Write the report and print the table."""
    from genkit_eval.report.build import build_report

    page = build_report(out)
    print(text_table(found))
    for note in [*found["warnings"], *notes]:
        print(f"note: {note}")
    print(f"\nreport:  {page}\nresults: {out / results.RESULTS}")
