"""One run: for each guidance, make the missing blocks, score them, write what is known so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from genkit_eval import provenance, results
from genkit_eval.blocks import BlockStore
from genkit_eval.config import KEEP_IMAGES, RunConfig, differences, slug
from genkit_eval.distributed import restarted, world
from genkit_eval.entries import Scoring, make_entry, settle
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.extractors.quantise import UINT8_RULES
from genkit_eval.files import check_writable, read_json, remove_leftovers, write_bytes, write_json
from genkit_eval.generate import RefusedError, block_ranges, fill
from genkit_eval.labels import rule_in_words
from genkit_eval.protocols import Pipeline, uint8_rule
from genkit_eval.references import Reference
from genkit_eval.report.grid import class_grid, png_bytes, same_seeds
from genkit_eval.score import MIN_SAMPLES, Bootstrap
from genkit_eval.selection import Metrics

#: Seconds after which every machine sees what another one has written.
VISIBLE_AFTER = 60.0
ONE_FOLDER = "all processes need one folder, on a disk that they share, and the same command"


@dataclass(frozen=True)
class Request:
    """What is asked of a run: guidances as (text as typed, object), the sample count, where to, and how to score.

    With ``tolerant`` a guidance that the model refuses is left out, as long as there is another one.
    """

    guidances: tuple[tuple[str, Any], ...]
    num_samples: int
    out: Path
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    overwrite: bool = False
    progress: bool = True
    device: str = "cpu"
    metrics: Metrics = field(default_factory=Metrics)
    tolerant: bool = False

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
    pipe: Pipeline,
    extractor: Extractor,
    sampler: str,
    steps: int,
    seed: int,
    labels: str,
    block_size: int,
    uint8: str | None = None,
    classes: tuple[int, ...] = (),
    preset: dict[str, Any] | None = None,
    keep_images: int = KEEP_IMAGES,
) -> RunConfig:
    """The configuration that a run's blocks are stamped with.

    ``uint8`` is a rule of ``UINT8_RULES``, None the pipeline's own; ``classes`` are the labels of a file;
    ``preset`` is what is said of one; ``keep_images`` says of how many images pixels are stored.
    """
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
        uint8_rule=uint8_rule(pipe) if uint8 is None else UINT8_RULES[uint8].formula,
        genkit=provenance.genkit_version(),
        classes=classes,
        preset=preset or {},
        keep_images=keep_images,
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
            BlockStore(folder, "").clear()
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
        "attention": provenance.attention(pipe),
        **({"preset": config.preset} if config.preset else {}),
        "generation": {
            **{key: known[key] for key in keys},
            "seed_rule": f"seed of image k = {config.seed} + k",
            "labels": config.labels,
            "label_rule": rule_in_words(config.labels),
            "class_names": list(pipe.class_names),
            "image_shape": list(pipe.image_shape),
        },
    }


def store_of(config: RunConfig, request: Request, rule: Any, made_with: dict[str, Any] | None = None) -> BlockStore:
    """The blocks of one guidance."""
    return BlockStore(request.out / slug(repr(rule)) / "blocks", config.hash(repr(rule)), made_with)


@contextmanager
def blaming(guidance: tuple[str, Any], out: Path) -> Iterator[None]:
    """What the pipeline refuses is put down to the guidance, what the disk refuses to the folder."""
    try:
        yield
    except RefusedError as error:
        raise InputError(f"--guidance {guidance[0]!r}", str(error)) from error
    except OSError as error:
        raise InputError("--out", f"cannot write in {out} ({error.strerror or error})") from error


@dataclass(frozen=True)
class Progress:
    """A bar over the images of all processes, ``start`` of which do not count."""

    bar: Any
    start: int

    def show(self) -> None:
        """Move the bar to where it should be."""
        self.bar.update(world().images - self.start - self.bar.n)

    def advance(self, images: int) -> None:
        """This process has ``images`` more."""
        world().advance(images)
        self.show()


def run_one(
    pipe: Pipeline,
    extractor: Extractor,
    config: RunConfig,
    request: Request,
    guidance: tuple[str, Any],
    scoring: Scoring,
    progress: Progress,
) -> dict[str, Any]:
    """Make, score and describe one guidance; returns its entry of the results. Other processes may make a part of the images."""
    text, rule = guidance
    name, stamp = slug(repr(rule)), config.hash(repr(rule))
    folder = request.out / name
    store = store_of(config, request, rule, provenance.made_with(request.device))
    progress.bar.set_description(f"{text}: images")
    refusal = make_share(pipe, rule, extractor, config, store, request, progress.advance)
    if why := world().gather(progress.show, refusal):
        raise RefusedError(why)
    await_blocks(store, config, request)
    progress.bar.set_description(f"{text}: metrics")
    block = store.read_all(request.num_samples, config.block_size)
    if len(block.pixels):
        write_bytes(folder / "grid.png", png_bytes(class_grid(block.pixels, block.labels.tolist(), pipe.class_names)))
    return make_entry(request.out, text, repr(rule), stamp, block, scoring)


def make_share(
    pipe: Pipeline,
    rule: Any,
    extractor: Extractor,
    config: RunConfig,
    store: BlockStore,
    request: Request,
    advance: Callable[[int], object],
) -> str:
    """Make this process's blocks. What the pipeline refuses is an error, or with ``tolerant`` returned."""
    try:
        fill(pipe, rule, extractor, config, store, request.num_samples, advance, world().mine)
    except RefusedError as error:
        if not request.tolerant:
            raise
        return str(error)
    return ""


def run(pipe: Pipeline, extractor: Extractor, reference: Reference, config: RunConfig, request: Request) -> dict[str, Any]:
    """Do what ``request`` asks and return the results, which are also in ``<out>/results.json``.

    After each guidance the file is replaced, with status "partial" until the last. Guidances that an earlier command put into the
    same folder stay in it, scored again if reference or bootstrap differ. Blocks that exist are not made again, so a run that was
    stopped goes on where it was.
    Of several processes, the first does all this, and the others make their share of the blocks and return nothing.
    ``left_out`` of what is returned says which guidances the model refused, where that is tolerated.
    Raises InputError for a model whose images the extractor does not take, for a folder that cannot be used, and for a guidance
    that the model refuses (naming it), or the last of them if it refuses all.
    """
    check_shape(pipe, extractor)
    if not world().first:
        return assist(pipe, extractor, config, request)
    prepare_folder(request.out, config, request.overwrite and not restarted())
    remove_leftovers(request.out)
    start = world().images
    world().follow()
    about = header(pipe, extractor, reference, config, request)
    scoring = Scoring(reference, request.bootstrap, extractor, request.metrics)
    asked = {repr(rule) for _, rule in request.guidances}
    entries = settle(request.out, results.earlier_entries(request.out), asked, config.block_size, scoring)
    found, left_out = dict[str, Any](), list[str]()
    total = len(request.guidances) * request.num_samples
    with tqdm(total=total, unit="img", file=sys.stderr, disable=not request.progress, dynamic_ncols=True) as bar:
        for number, guidance in enumerate(request.guidances, start=1):
            try:
                with blaming(guidance, request.out):
                    entry = run_one(pipe, extractor, config, request, guidance, scoring, Progress(bar, start))
            except InputError as error:
                last = number == len(request.guidances)
                if not (request.tolerant and isinstance(error.__cause__, RefusedError)) or (last and not entries):
                    raise
                left_out.append(str(error))
            else:
                entries = results.replace_entry(entries, entry)
            found = results.write_results(request.out, about, entries, complete=number == len(request.guidances))
    return {**found, "left_out": left_out} if left_out else found


def assist(pipe: Pipeline, extractor: Extractor, config: RunConfig, request: Request) -> dict[str, Any]:
    """What each process but the first does: its share of the blocks of every guidance, as soon as the folder is prepared."""
    world().follow()
    path = request.out / results.CONFIG
    if not appears(lambda: path.exists() and not differences(read_json(path, "--out"), config.as_dict())):
        found = "; ".join(differences(read_json(path, "--out"), config.as_dict()))
        raise InputError("--out", f"{request.out} as this process sees it is of another run ({found}); {ONE_FOLDER}")
    for guidance in request.guidances:
        store = store_of(config, request, guidance[1], provenance.made_with(request.device))
        with blaming(guidance, request.out):
            refusal = make_share(pipe, guidance[1], extractor, config, store, request, world().advance)
        world().gather(refusal=refusal)
    return {}


def await_blocks(store: BlockStore, config: RunConfig, request: Request) -> None:
    """Wait until the blocks of all processes can be seen here; InputError for those that stay away."""
    ranges = block_ranges(request.num_samples, config.block_size)

    def missing() -> list[int]:
        return [index for index, indices in enumerate(ranges) if not store.done(index, len(indices))]

    if not appears(lambda: not missing()):
        ranks = ", ".join(map(str, sorted({index % world().size for index in missing()})))
        raise InputError("--out", f"{store.folder} lacks blocks that rank {ranks} has made; {ONE_FOLDER}")


def appears(there: Callable[[], bool]) -> bool:
    """Whether it is there, or comes within a minute: a network file system shows what others wrote late. At once when alone."""
    until = time.monotonic() + VISIBLE_AFTER
    while not (seen := there()) and world().size > 1 and time.monotonic() < until:
        world().check()
        time.sleep(0.5)
    return seen


def blocks_done(config: RunConfig, request: Request) -> tuple[int, int]:
    """How many of the blocks that ``request`` needs are finished, and how many there are."""
    ranges = block_ranges(request.num_samples, config.block_size)
    stores = [store_of(config, request, rule) for _, rule in request.guidances]
    done = sum(store.done(i, len(indices)) for store in stores for i, indices in enumerate(ranges))
    return done, len(stores) * len(ranges)


def compare_sheet(out: Path, found: dict[str, Any]) -> None:
    """Write ``compare.png``: the first images of every guidance, one row each, so that a column differs in guidance only."""
    rows = []
    for entry in found["guidances"]:
        store = BlockStore(out / entry["slug"] / "blocks", entry["config_sha256"])
        pixels = store.read(0).pixels if store.done(0, 1) else None
        if pixels is not None and len(pixels):
            rows.append((entry["label"], pixels))
    if rows:
        write_bytes(out / "compare.png", png_bytes(same_seeds(rows)))
