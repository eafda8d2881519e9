"""One image, step by step: what each step saw, decided and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from genkit.guidance import Guidance, Interval
from genkit.guidance.base import StepInfo
from genkit_apps.cards import expression
from genkit_apps.generation import Request, call
from genkit_apps.jobs import Event, Job
from genkit_apps.limits import Limits, Refused
from genkit_apps.plots import Traced, steps_of, trajectory

#: Pixels along the longer side of a preview, and of all of them together; larger ones are reduced, as all of them are kept.
LARGEST, KEPT = 256, 4_000_000


@dataclass(frozen=True)
class Trajectory:
    """How an image came about.

    Attributes:
        guidance: as an expression.
        rows: one for each step, see :func:`genkit_apps.plots.steps_of`.
        previews: the clean image that each step believed in.
        image: the result.
        nfe: network rows spent.
        seconds: the image took, without previews.
        plots: of the rows.
        band: noise levels in which the guidance acts, where it says so.
    """

    guidance: str
    rows: tuple[dict[str, Any], ...]
    previews: tuple[Image, ...]
    image: Image
    nfe: int
    seconds: float
    plots: Traced
    band: tuple[float, float] | None = None


def follow(request: Request, guidance: Guidance, job: Job, limits: Limits) -> Trajectory:
    """Make the image of a request of one, keeping what every step believed.

    Raises:
        Cancelled: at the next step after the job was cancelled.
        Refused: it took longer than the limits allow.
        ValueError: the model cannot have this guidance, or diverged.
    """
    previews, started, spent = list[Image](), time.perf_counter(), 0.0
    largest = min(LARGEST, int((KEPT / request.total) ** 0.5))

    def seen(info: StepInfo, images: Callable[[], Sequence[Image]]) -> None:
        nonlocal spent
        job.check()
        if time.perf_counter() - started > limits.seconds:
            raise Refused("steps", f"stopped after {limits.seconds:.0f} seconds; ask for fewer steps")
        begun = time.perf_counter()
        previews.append(images()[0])
        spent += time.perf_counter() - begun
        place = (info.index + 1, request.total)
        text = f"sigma {info.sigma:.3g}"
        job.emit(Event("preview", *place, (previews[-1],), text) if job.due() else Event("progress", *place, (), text))

    out = call(request, guidance, seen, "full", largest)
    seconds, rows = time.perf_counter() - started - spent, tuple(steps_of(out.trace.rows))
    made = (rows, tuple(previews), out.images[0], int(out.nfe[0]), seconds)
    return Trajectory(expression(guidance), *made, trajectory(rows), band(guidance))


def band(guidance: Guidance) -> tuple[float, float] | None:
    """The noise levels in which a guidance acts, if it is an :class:`Interval` of them."""
    return (guidance.low, guidance.high) if isinstance(guidance, Interval) and guidance.unit == "sigma" else None


def limited(guidance: Guidance, low: Any, high: Any) -> Guidance:
    """The guidance in another interval of noise levels. Raises Refused for bounds that are none."""
    try:
        low, high = float(low), float(high)
        if band(guidance) is not None:
            return replace(guidance, low=low, high=high)  # type: ignore[call-arg]  # an Interval
        return Interval(guidance, low, high)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refused("interval", str(error)) from None


__all__ = ["Trajectory", "band", "follow", "limited"]
