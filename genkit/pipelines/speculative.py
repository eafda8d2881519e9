"""What ``pipe(..., speculative=...)`` means: which rule, which drafter, which trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch

from genkit.guidance.base import is_number
from genkit.guidance.expressions import build
from genkit.models.eagle import EagleConfig, EagleHead
from genkit.samplers.autoregressive.speculative import (
    Acceptance,
    CopyDrafter,
    Drafter,
    DynamicTree,
    EagleDrafter,
    Exact,
    Lantern,
    ModelDrafter,
    Report,
    Shape,
    StaticTree,
)
from genkit.tokenizers.quantizers import Quantizer, VectorQuantizer


@dataclass(frozen=True)
class Speculative:
    """Speculative decoding: a drafter proposes a tree of tokens, and one pass of the network accepts several of them.

    Args:
        acceptance: ``Exact()`` (default), which keeps the network's own law; ``Lantern(k=100, delta=0.1)``, which lets codes
            stand for their neighbours; a number d, short for Lantern with delta = d and k = 1000, or as many codes as there are.
        drafter: None is the pipeline's own; ``"ngram"`` copies what stood there before, and needs no network; an
            :class:`genkit.models.eagle.EagleHead`; any drafter of :mod:`genkit.samplers.autoregressive.speculative`.
        tree: the shape of what an EagleHead drafts: ``StaticTree(...)``, random draws; ``DynamicTree(...)``, the most probable
            tokens, which suits low temperatures and peaked distributions; a number n is a chain of n draws. None is 4.

    Raises:
        ValueError: something else than these.
    """

    acceptance: Acceptance | float = Exact()  # noqa: RUF009 (immutable)
    drafter: Drafter | EagleHead | Literal["ngram"] | None = None
    tree: Shape | int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.acceptance) and not hasattr(self.acceptance, "credit"):
            raise ValueError(f"speculative: acceptance={self.acceptance!r} must be Exact(), Lantern(...) or a number, its delta")
        known = self.drafter in (None, "ngram") if isinstance(self.drafter, str | None) else isinstance(self.drafter, EagleHead)
        if not known and not hasattr(self.drafter, "start"):
            raise ValueError(f"speculative: drafter={self.drafter!r} must be None, 'ngram', an EagleHead or a drafter")
        number = isinstance(self.tree, int) and not isinstance(self.tree, bool)
        if not (self.tree is None or hasattr(self.tree, "grow") or (number and self.tree > 0)):
            raise ValueError(f"speculative: tree={self.tree!r} must be StaticTree(...), DynamicTree(...), or a number from 1")


#: Tokens drafted for a pass where nothing else is said.
LENGTH = 4
#: What expressions may be made of.
NAMES: dict[str, Any] = {kind.__name__: kind for kind in (Lantern, Exact, Speculative, CopyDrafter, DynamicTree, StaticTree)}


def as_speculative(value: Any) -> Speculative | None:
    """From what a pipeline is given; None is decoding token by token. Raises ValueError for what it cannot be."""
    if value is None or value is False:
        return None
    if value is True:
        return Speculative()
    if isinstance(value, str):
        return as_speculative(build(value, NAMES, "speculative"))
    return value if isinstance(value, Speculative) else Speculative(value)


class Plan(NamedTuple):
    """A rule and a drafter that fit a network."""

    rule: Acceptance
    drafter: Drafter


def plan_for(asked: Speculative, network: Any, own: EagleHead | Drafter | None, codes: Quantizer, name: str) -> Plan:
    """What is asked for, on this network.

    Args:
        own: the pipeline's drafter, if it has one.
        codes: whose neighbours a :class:`Lantern` without any takes, see :func:`raw`.
        name: of the pipeline, for errors.

    Raises:
        ValueError: tokens in several parts, no drafter, one of another network, or a k that the codebook does not have.
    """
    if len(network.parts) > 1:
        raise ValueError(
            f"speculative: a token of {name} has {len(network.parts)} parts, drawn one after the other; leave it out"
        )
    rule = asked.acceptance
    if is_number(rule):
        rule = Lantern(min(1000, codes.size - 2), float(rule))
    if isinstance(rule, Lantern) and rule.neighbours is None:
        rule = rule.among(codes)
    return Plan(rule, _drafter(asked, network, own, name))  # type: ignore[arg-type]  # is_number tells nothing of the rest


def _drafter(asked: Speculative, network: Any, own: EagleHead | Drafter | None, name: str) -> Drafter:
    found = own if asked.drafter is None else asked.drafter
    if found is None:
        raise ValueError(
            f"speculative: {name} has no drafter; load it with drafter='FILE', or use Speculative(drafter='ngram'), which needs "
            "no network"
        )
    if isinstance(found, EagleHead):
        check_head(found.config, network, name)
        # Images have many likely tokens at every place: a draw of the drafter is accepted far more often than its best guesses.
        tree = LENGTH if asked.tree is None else asked.tree
        return EagleDrafter(found, network.output, StaticTree.chain(tree) if isinstance(tree, int) else tree)
    if asked.tree is not None:
        raise ValueError(f"speculative: tree={asked.tree!r} is for the trees of an EagleHead; this drafter has its own")
    if isinstance(found, EagleDrafter):
        check_head(found.head.config, network, name)
    if isinstance(found, ModelDrafter):
        models = found.models if isinstance(found.models, dict) else {"main": found.models}
        other = models["main"]
        _check((other.parts, other.tokens), (network.parts, network.tokens), "vocabulary and tokens", name, "drafter")
    return CopyDrafter() if isinstance(found, str) else found


def check_head(head: EagleConfig, network: Any, name: str, given: str = "drafter") -> None:
    """Raise ValueError if a drafter was made for another network: other codes, width or positions."""
    parts, config = network.parts, network.config
    own = (head.vocabulary, head.width, head.tokens, head.prefix)
    theirs = (parts[0] if len(parts) == 1 else parts, config.width, network.tokens, network.prefix)
    _check(own, theirs, "vocabulary, width, tokens and prefix", name, given)


def _check(own: tuple[Any, ...], theirs: tuple[Any, ...], what: str, name: str, given: str) -> None:
    if own != theirs:
        raise ValueError(f"{given} is made for {what} {own}, but {name} has {theirs}; give the drafter trained for it")


def raw(quantizer: Quantizer) -> Quantizer:
    """The codes among which LANTERN looks for neighbours: as they were trained, where the quantizer normalises them."""
    if not getattr(quantizer, "l2_norm", False):
        return quantizer
    table: Any = quantizer.get_submodule("embedding").weight
    plain = VectorQuantizer(*table.shape)
    plain.embedding.weight = torch.nn.Parameter(table.detach().float(), requires_grad=False)
    return plain


def joined(reports: Sequence[Report]) -> Report | None:
    """One report of several batches; None of none."""
    if not reports:
        return None
    tested, passed = (
        [sum(level) for level in zip_longest(*(getattr(r, key) for r in reports), fillvalue=0)] for key in ("tested", "passed")
    )
    return Report(
        passes=torch.cat([r.passes for r in reports]),
        accepted=torch.cat([r.accepted for r in reports]),
        depth=torch.cat([r.depth for r in reports]),
        moved=torch.cat([r.moved for r in reports]),
        tested=tested,
        passed=passed,
        draft_seconds=sum(r.draft_seconds for r in reports),
        verify_seconds=sum(r.verify_seconds for r in reports),
        emitted=sum(r.emitted for r in reports),
    )


__all__ = ["NAMES", "Plan", "Speculative", "as_speculative", "check_head", "joined", "plan_for", "raw"]
