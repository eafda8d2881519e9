"""One image of a model that draws tokens: how it fills in, and what drafted tokens did."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from genkit.guidance import Guidance
from genkit.pipelines.speculative import Speculative
from genkit.samplers.autoregressive.speculative import DynamicTree, Exact, Lantern, Report, StaticTree
from genkit_apps.cards import expression
from genkit_apps.generation import Request
from genkit_apps.jobs import Event, Job
from genkit_apps.limits import Limits, Refused
from genkit_apps.models import Model

CHAIN, TREE, DYNAMIC, COPY = "chain of draws", "two draws at each level", "most probable tokens", "copies (no network)"
DRAFTS = (CHAIN, TREE, DYNAMIC, COPY)


@dataclass(frozen=True)
class Draft:
    """What stands in the fields of speculative decoding.

    Attributes:
        budget: probability that may move to one token, in total variation (LANTERN's delta); 0 keeps the network's own law.
        k: neighbours that a token may stand for.
        kind: one of ``DRAFTS``.
        length: levels of what is drafted.
    """

    budget: float
    k: float
    kind: str
    length: float

    def speculative(self, model: Model, limits: Limits) -> Speculative:
        """What a pipeline is given. Raises Refused."""
        size = model.pipe.network.parts[0]
        length = limits.number(self.length, "length", 1, 16)
        k = limits.number(self.k, "k", 1, size - 2)
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not 0 <= self.budget <= 1:
            raise Refused("budget", f"{str(self.budget)[:40]} must be a number from 0 (exact) to 1")
        if self.kind not in DRAFTS:
            raise Refused("tree", f"{str(self.kind)[:40]!r} is not known; use one of {', '.join(DRAFTS)}")
        rule = Lantern(k, float(self.budget)) if self.budget else Exact()
        if self.kind == COPY:
            return Speculative(rule, "ngram")
        if model.pipe.drafter is None:
            raise Refused("speculative", f"{model.name} has no drafter; choose {COPY!r} as drafted tree, which needs none")
        trees: dict[str, Any] = {CHAIN: length, TREE: two_wide(length), DYNAMIC: DynamicTree(4 * length + 1, length, 4)}
        return Speculative(rule, tree=trees[self.kind])


def two_wide(levels: int) -> StaticTree:
    """A chain with a second draw beside each of its tokens."""
    chain = [(0,) * level for level in range(levels)]
    return StaticTree(tuple((*node, last) for node in chain for last in (0, 1)))


@dataclass
class Live:
    """A drawing while it is made: how many tokens there are after each pass, images after each scale, seconds of the model."""

    counts: list[int] = field(default_factory=list)
    scales: list[Image] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    shown: float = 0.0

    @property
    def seconds(self) -> float:
        """So far, without those that previews took."""
        return time.perf_counter() - self.started - self.shown


@dataclass(frozen=True)
class Drawing:
    """An image of tokens and how it came about.

    Attributes:
        guidance: as an expression.
        counts: tokens after each pass of the network; empty for models that draw scale by scale.
        scales: the image after each scale; empty for models that draw token by token.
        tokens: how many there are.
        nfe: network positions spent.
        seconds: of the model, without previews.
        report: how drafted tokens fared, if there were any.
    """

    guidance: str
    image: Image
    counts: tuple[int, ...]
    scales: tuple[Image, ...]
    tokens: int
    nfe: int
    calls: int
    seconds: float
    report: Report | None = None


def draw(
    request: Request, guidance: Guidance, live: Live, job: Job, limits: Limits, *, drafted: Speculative | None, temperature: float
) -> Drawing:
    """Make the image of a request of one.

    Raises:
        Cancelled: at the next step after the job was cancelled.
        Refused: it took longer than the limits allow.
        ValueError: the model cannot have this guidance, or not together with drafted tokens.
    """
    pipe, by_scale = request.model.pipe, request.model.kind == "next-scale"

    def seen(part: Any) -> None:
        job.check()
        if live.seconds > limits.seconds:
            raise Refused("model", f"stopped after {limits.seconds:.0f} seconds")
        begun = time.perf_counter()
        images: tuple[Image, ...] = ()
        if by_scale:
            live.scales.append(part.images[0])
            images = (live.scales[-1],)
        else:
            live.counts.append(int((part.tokens[0] >= 0).sum()))
            if job.due():
                images = (part.images[0],)
        text = f"scale {part.index + 1}" if by_scale else f"token {live.counts[-1]}"
        job.emit(Event("preview" if images else "progress", part.index + 1, part.total, images, text))
        live.shown += time.perf_counter() - begun

    what: dict[str, Any] = request.conditions if drafted is None else {**request.conditions, "speculative": drafted}
    live.started = time.perf_counter()
    out = pipe(**what, seeds=list(request.seeds), guidance=guidance, temperature=temperature, callback=seen)
    counts = tuple(live.counts)
    if out.speculation is not None:
        counts = (1, *counts)  # the first token comes of a pass of its own
    seconds, tokens = live.seconds, 0 if out.tokens is None else out.tokens.shape[1]
    image, shown = out.images[0], tuple(live.scales)
    return Drawing(expression(guidance), image, counts, shown, tokens, int(out.nfe[0]), out.calls, seconds, out.speculation)


__all__ = ["CHAIN", "COPY", "DRAFTS", "DYNAMIC", "TREE", "Draft", "Drawing", "Live", "draw", "two_wide"]
