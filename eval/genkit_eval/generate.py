"""Generation of blocks: image k is a function of model, guidance, sampler, seed k and class k."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genkit.guidance.expressions import build
from genkit_eval.blocks import Block, BlockStore
from genkit_eval.config import RunConfig
from genkit_eval.extractors import MAIN, Extractor
from genkit_eval.extractors.quantise import rule_of
from genkit_eval.labels import labels_of
from genkit_eval.metrics.colour import pixel_layers
from genkit_eval.protocols import Pipeline, uint8_rule


class RefusedError(ValueError):
    """The pipeline refused the guidance, or made images that cannot be scored."""


def make_block(pipe: Pipeline, guidance: Any, extractor: Extractor, config: RunConfig, indices: range) -> Block:
    """Generate the images ``indices`` and extract their features; seed k is ``config.seed + k``.

    Raises RefusedError when the pipeline raises ValueError, and for images whose features are not finite.
    """
    labels = labels_of(indices, pipe.num_classes, config.labels, config.seed, config.classes)
    seeds = [config.seed + k for k in indices]
    first = indices.start == 0
    wall, cpu = time.perf_counter(), time.process_time()
    trace = "full" if first else "none"
    try:
        out = pipe(classes=labels, seeds=seeds, guidance=guidance, trace=trace, **options_of(pipe, config.sampler, config.steps))
        pixels = to_uint8(pipe, out, config.uint8_rule).cpu()
    except ValueError as error:
        raise RefusedError(str(error)) from error
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    layers = extractor(pixels) | pixel_layers(pixels)
    if not all(bool(torch.isfinite(values).all()) for values in layers.values()):
        raise RefusedError(
            f"features of images {indices.start} to {indices.stop - 1} are not finite: the model or the guidance diverged"
        )
    return Block(
        layers.pop(MAIN),
        pixels[: max(0, config.keep_images - indices.start)],
        torch.tensor(labels),
        torch.tensor([int(n) for n in out.nfe]),
        wall,
        cpu,
        int(out.calls),
        _plain_rows(out.trace.rows, len(labels)) if first else [],
        layers=layers,
    )


def to_uint8(pipe: Pipeline, out: Any, formula: str) -> Tensor:
    """8-bit pixels of what the pipeline returned, by its own rule or by the one of this formula. ValueError for NaN."""
    rule = rule_of(formula)
    pixels: Tensor = out.pixels if rule is None or formula == uint8_rule(pipe) else rule(out.latents)
    return pixels


def options_of(pipe: Pipeline, sampler: str, steps: int) -> dict[str, Any]:
    """How the pipeline is told to sample. One that draws in one way alone takes that name's arguments: ``next_token(top_k=50)``.

    Raises ValueError for anything else than that call.
    """
    own = getattr(pipe, "sampler", None)
    if own is None:
        return {"sampler": sampler, "steps": steps}
    found = build(sampler, {own: dict}, "sampler")
    if not isinstance(found, dict):
        raise ValueError(f"sampler={sampler!r}: {pipe.name} draws by {own}")
    if unknown := set(found) - set(inspect.signature(pipe.__call__).parameters):
        raise ValueError(f"sampler: {own} takes no {', '.join(sorted(unknown))}")
    return found


def _plain_rows(rows: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Trace rows as JSON can hold them, with the number of images they were averaged over."""
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    return [{**row, "images": images} for row in finite]


def block_ranges(total: int, size: int) -> list[range]:
    """Image indices of each block; the last may be shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def fill(
    pipe: Pipeline,
    guidance: Any,
    extractor: Extractor,
    config: RunConfig,
    store: BlockStore,
    total: int,
    advance: Callable[[int], object],
    mine: Callable[[int], bool] = lambda index: True,
) -> int:
    """Make every block of the first ``total`` images that is not stored yet; returns how many were made.

    Only blocks whose index is ``mine`` are looked at. ``advance(n)`` is called as n more images are there. A block is stored
    before the next is begun, so the finished ones stay whatever stops the run. Commands on one folder share the work: blocks that
    another one has begun come last, and are made only if they are still not there, so at most one block for each process is made
    twice (bit for bit the same).
    """
    made = 0

    def visit(index: int, indices: range) -> None:
        nonlocal made
        if not store.done(index, len(indices)):
            with store.claim(index):
                store.write(index, make_block(pipe, guidance, extractor, config, indices))
            made += 1
        advance(len(indices))

    later = []
    for index, indices in enumerate(block_ranges(total, config.block_size)):
        if not mine(index):
            continue
        if store.taken(index) and not store.done(index, len(indices)):
            later.append((index, indices))
        else:
            visit(index, indices)
    for index, indices in later:
        visit(index, indices)
    return made
