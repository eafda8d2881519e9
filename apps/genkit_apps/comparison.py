"""Several guidances on the same request: checked together, generated one after the other in one job."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from genkit.guidance import Guidance
from genkit_apps.bundle import numbered, record, snippet
from genkit_apps.cards import expression
from genkit_apps.generation import Asked, Column, Request, check_guidance, generate, in_short
from genkit_apps.jobs import Event, Job, stream
from genkit_apps.limits import Limits, Refused
from genkit_apps.models import Models


@dataclass(frozen=True)
class Snapshot:
    """How far a comparison is.

    Attributes:
        columns: one for each guidance, those to come without images, the one at work with its last preview.
        working: its index; None at the end.
        event: the news; None at the end.
    """

    columns: tuple[Column, ...]
    working: int | None = None
    event: Event | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison that can start, or why it cannot.

    Attributes:
        problems: messages by field; those of guidances under ``guidance 1``, ``guidance 2``...
    """

    request: Request | None
    guidances: tuple[Guidance, ...]
    problems: dict[str, str]


def plan(asked: Asked, guidances: Sequence[Any], models: Models, limits: Limits) -> Plan:
    """Check all that is asked for, so that every message can be shown at once."""
    problems, rules, request = dict[str, str](), list[Guidance](), None
    try:
        request = asked.checked(models, limits)
    except Refused as refused:
        problems[refused.field] = refused.message
    if isinstance(guidances, str):
        guidances = [guidances]
    if not isinstance(guidances, Sequence):
        problems["guidances"], guidances = 'write a list of expressions, such as ["none", "CFG(3.0)"]', ["none"]
    if not 1 <= len(guidances) <= limits.columns:
        problems["guidances"] = f"{len(guidances)} guidances; compare 1 to {limits.columns}"
    for c, text in enumerate(guidances[: limits.columns], 1):
        try:
            rule = limits.guidance(text, f"guidance {c}")
            rules.append(rule)
            if request is not None:
                check_guidance(rule, request, limits, f"guidance {c}")
        except Refused as refused:
            problems[refused.field] = refused.message
    return Plan(None if problems else request, tuple(rules), problems)


def compare(request: Request, guidances: Sequence[Guidance], limits: Limits, key: str | None = None) -> Iterator[Snapshot]:
    """Generate column by column. A column whose guidance turns out not to work says why, and the next one goes on.

    Raises:
        Cancelled: the columns of the last snapshot are what there is.
    """
    finished = list[Column]()
    total = request.total * len(guidances)

    def work(job: Job) -> None:
        for c, guidance in enumerate(guidances):
            before = c * request.total
            try:
                finished.append(generate(request, guidance, job, before, total, limits, expression(guidance)))
            except ValueError as error:  # the library's own words on what does not go together; Refused is one, too
                finished.append(Column(expression(guidance), error=in_short(str(error), guidance)))
            job.emit(Event("done", before + request.total, total, (), expression(guidance)))

    texts, preview = [expression(g) for g in guidances], tuple[Image, ...]()
    for event in stream(work, key):
        if not isinstance(event, Event):
            break
        working = max(event.step - 1, 0) // request.total
        if event.kind == "done":
            preview, working = (), working + 1
        elif event.images:
            preview = tuple(image for image in event.images if image is not None)
        yield Snapshot(_columns(texts, finished[:working], preview), working, event)
    yield Snapshot(tuple(finished))


def _columns(texts: Sequence[str], finished: Sequence[Column], preview: tuple[Image, ...]) -> tuple[Column, ...]:
    to_come = [Column(text) for text in texts[len(finished) :]]
    if to_come and preview:
        to_come[0] = Column(to_come[0].guidance, preview)
    return (*finished, *to_come)


def as_plain(request: Request, columns: Sequence[Column]) -> dict[str, Any]:
    """The result for programs: the record, the Python that does the same, and the images of each column as PNG in base64."""
    return {
        "record": record(request, columns),
        "python": snippet(request, numbered(columns)),
        "images": [[_png(image) for image in column.images] for column in columns],
    }


def _png(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["Plan", "Snapshot", "as_plain", "compare", "plan"]
