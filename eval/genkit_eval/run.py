"""One run: for each guidance, make the missing blocks, score them, write what is known so far."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from genkit_eval import provenance, results
from genkit_eval.blocks import BlockStore
from genkit_eval.config import RunConfig, differences, slug
from genkit_eval.entries import Scoring, make_entry, settle
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.files import check_writable, read_json, write_bytes, write_json
from genkit_eval.generate import RefusedError, block_ranges, fill
from genkit_eval.labels import LABEL_RULES
from genkit_eval.protocols import Pipeline
from genkit_eval.references import Reference
from genkit_eval.report.grid import class_grid, png_bytes, same_seeds
from genkit_eval.score import MIN_SAMPLES, Bootstrap


@dataclass(frozen=True)
class Request:
    """What is asked of a run: guidances as (text as typed, object), the sample count, where to, and how to score."""

    guidances: tuple[tuple[str, Any], ...]
    num_samples: int
    out: Path
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    overwrite: bool = False
    progress: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.num_samples < MIN_SAMPLES:
            raise InputError("--num-samples", f"got {self.num_samples}; at least {MIN_SAMPLES} works")
        if not self.guidances:
            raise InputError("--guidance", "none given; for example --guidance 'CFG(3.0)'")
        seen: dict[Any, str] = {}
        for text, guidance in self.guidances:
            if guidance in seen:
                raise InputError("--guidance", f"{text} is given twice (also as {seen[guidance]})")
            seen[guidance] = text


def make_config(
    pipe: Pipeline, extractor: Extractor, sampler: str, steps: int, seed: int, labels: str, block_size: int
) -> RunConfig:
    """The configuration that a run's blocks are stamped with."""
    from genkit.pipelines.images import UINT8_RULE

    return RunConfig(
        model=pipe.name,
        model_sha256=pipe.fingerprint,
        sampler=sampler,
        steps=steps,
        seed=seed,
        labels=labels,
        block_size=block_size,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        uint8_rule=UINT8_RULE,
        genkit=provenance.genkit_version(),
    )


def check_shape(pipe: Pipeline, extractor: Extractor) -> None:
    """InputError when the extractor does not take images of the size that the model makes."""
    made, taken = tuple(pipe.image_shape), extractor.image_shape
    if taken is not None and made != tuple(taken):
        shown, wanted = ("x".join(map(str, shape)) for shape in (made, taken))
        raise InputError("--model", f"{pipe.name} makes images of {shown}; extractor {extractor.name} takes {wanted}")


def prepare_folder(out: Path, config: RunConfig, overwrite: bool) -> None:
    """Claim ``out`` for ``config``; InputError when it cannot be written or holds a different run and ``overwrite`` is off."""
    check_writable(out)
    path = out / results.CONFIG
    if path.exists() and not overwrite:
        found = differences(read_json(path, "--out"), config.as_dict())
        if found:
            raise InputError("--out", f"{out} holds another run: {'; '.join(found)}. Choose another folder, or --overwrite")
    if overwrite:
        for file in (results.RESULTS, results.CONFIG, "report.html"):
            (out / file).unlink(missing_ok=True)
        for folder in out.glob("*/blocks"):
            BlockStore(folder, "").clean(everything=True)
    write_json(path, config.as_dict())


def common_header(extractor: Extractor, reference: Reference, bootstrap: Bootstrap, device: str) -> dict[str, Any]:
    """What a results file says whether its images were made here or found."""
    return {
        "date": provenance.now(),
        "command": provenance.command(),
        "versions": provenance.versions(),
        "git": provenance.git_commit(),
        "hardware": provenance.hardware(device),
        "extractor": extractor.as_dict(),
        "reference": reference.as_dict(),
        "bootstrap": bootstrap.as_dict(),
    }


def header(pipe: Pipeline, extractor: Extractor, reference: Reference, config: RunConfig, request: Request) -> dict[str, Any]:
    """Everything a results file says beside the numbers."""
    known = config.as_dict()
    keys = ("model", "model_sha256", "sampler", "steps", "seed", "block_size", "uint8_rule")
    return {
        **common_header(extractor, reference, request.bootstrap, request.device),
        "generation": {
            **{key: known[key] for key in keys},
            "seed_rule": f"seed of image k = {config.seed} + k",
            "labels": config.labels,
            "label_rule": LABEL_RULES[config.labels],
            "class_names": list(pipe.class_names),
            "image_shape": list(pipe.image_shape),
        },
    }


def run_one(
    pipe: Pipeline,
    extractor: Extractor,
    config: RunConfig,
    request: Request,
    guidance: tuple[str, Any],
    scoring: Scoring,
    bar: Any,
) -> dict[str, Any]:
    """Make, score and describe one guidance; returns its entry of the results."""
    text, rule = guidance
    name, stamp = slug(repr(rule)), config.hash(repr(rule))
    folder = request.out / name
    store = BlockStore(folder / "blocks", stamp, provenance.made_with(request.device))
    store.clean()
    bar.set_description(f"{text}: images")
    fill(pipe, rule, extractor, config, store, request.num_samples, bar.update)
    bar.set_description(f"{text}: metrics")
    block = store.read_all(request.num_samples, config.block_size)
    write_bytes(folder / "grid.png", png_bytes(class_grid(block.pixels, block.labels.tolist(), pipe.class_names)))
    return make_entry(request.out, text, repr(rule), stamp, block, scoring)


def run(pipe: Pipeline, extractor: Extractor, reference: Reference, config: RunConfig, request: Request) -> dict[str, Any]:
    """Do what ``request`` asks and return the results, which are also in ``<out>/results.json``.

    After each guidance the file is replaced, with status "partial" until the last. Guidances that an earlier command put into the
    same folder stay in it, scored again if reference or bootstrap differ. Blocks that exist are not made again, so a run that was
    stopped goes on where it was.
    Raises InputError for a model whose images the extractor does not take, for a folder that cannot be used, and for a guidance
    that the model refuses (naming it).
    """
    check_shape(pipe, extractor)
    prepare_folder(request.out, config, request.overwrite)
    about = header(pipe, extractor, reference, config, request)
    scoring = Scoring(reference, request.bootstrap, extractor.label)
    asked = {repr(rule) for _, rule in request.guidances}
    entries = settle(request.out, results.earlier_entries(request.out), asked, config.block_size, scoring)
    found: dict[str, Any] = {}
    total = len(request.guidances) * request.num_samples
    with tqdm(total=total, unit="img", file=sys.stderr, disable=not request.progress, dynamic_ncols=True) as bar:
        for number, guidance in enumerate(request.guidances, start=1):
            try:
                entry = run_one(pipe, extractor, config, request, guidance, scoring, bar)
            except RefusedError as error:
                raise InputError(f"--guidance {guidance[0]!r}", str(error)) from error
            except OSError as error:
                raise InputError("--out", f"cannot write in {request.out} ({error.strerror or error})") from error
            entries = results.replace_entry(entries, entry)
            found = results.write_results(request.out, about, entries, complete=number == len(request.guidances))
    return found


def blocks_done(config: RunConfig, request: Request) -> tuple[int, int]:
    """How many of the blocks that ``request`` needs are finished, and how many there are."""
    ranges = block_ranges(request.num_samples, config.block_size)
    stores = [BlockStore(request.out / slug(repr(g)) / "blocks", config.hash(repr(g))) for _, g in request.guidances]
    done = sum(store.done(i, len(indices)) for store in stores for i, indices in enumerate(ranges))
    return done, len(stores) * len(ranges)


def compare_sheet(out: Path, found: dict[str, Any]) -> None:
    """Write ``compare.png``: the first images of every guidance, one row each, so that a column differs in guidance only."""
    rows = []
    for entry in found["guidances"]:
        store = BlockStore(out / entry["slug"] / "blocks", entry["config_sha256"])
        if store.done(0, 1):
            rows.append((entry["label"], store.read(0).pixels))
    if rows:
        write_bytes(out / "compare.png", png_bytes(same_seeds(rows)))
