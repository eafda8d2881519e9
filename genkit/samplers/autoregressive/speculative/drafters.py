"""What proposes tokens. A drafter is configuration; ``start`` opens a run of it beside the target's.

``EagleDrafter`` predicts the target's features, ``ModelDrafter`` is a smaller network, ``CopyDrafter`` looks up what came before.
The guidance holds for the drafter as for the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from genkit.models.eagle import EagleHead
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.autoregressive.guided import centre
from genkit.samplers.autoregressive.speculative.stepwise import TreeLogits
from genkit.samplers.autoregressive.speculative.tree import DynamicTree, Expansion, Sample, Shape, StaticTree, TokenTree
from genkit.samplers.autoregressive.speculative.tree import attention_mask as mask_of

DYNAMIC = DynamicTree()


class Seen(NamedTuple):
    """What there is before a proposal. Of the counts[b] tokens of row b the target has not seen the last one: the root."""

    tokens: Tensor  # (B, N); behind counts[b] anything
    counts: Tensor  # (B,)
    fresh: Tensor  # (B,): how many positions the target has kept since the last proposal; 0 in rows that are finished
    features: Mapping[str, Tensor]  # by the name of the branch: (B, max(fresh), d), of these positions


class Proposer(Protocol):
    """One run of a drafter."""

    def propose(self, seen: Seen, sample: Sample | None) -> TokenTree:
        """A tree whose root is the last token of each row. ``sample`` draws tokens; None: take the most probable ones."""


class Drafter(Protocol):
    """Any source of token trees."""

    @property
    def nodes(self) -> int:
        """The most nodes of a tree, the root included."""

    def start(self, run: TreeLogits) -> Proposer:
        """A new run, beside the target's."""


class EagleDrafter:
    """Trees from an :class:`genkit.models.eagle.EagleHead` (LANTERN's drafter).

    Args:
        head: of the same width and vocabulary as the target.
        output: the target's last layer, from features to logits (``LlamaGen.output``).
        shape: of the trees.
    """

    def __init__(self, head: EagleHead, output: torch.nn.Module, shape: Shape = DYNAMIC) -> None:
        self.head, self.output, self.shape = head, output, shape
        self.nodes = shape.nodes

    def start(self, run: TreeLogits) -> Proposer:
        return _EagleRun(self, run)


class _EagleRun:
    def __init__(self, drafter: EagleDrafter, run: TreeLogits) -> None:
        self.head, self.output, self.shape, self.run = drafter.head, drafter.output, drafter.shape, run
        self.total: int = run.model("main").tokens
        self.filled = torch.zeros(run.batch, dtype=torch.long)
        self.cache: StaticCache | None = None
        self.names: tuple[str, ...] = ()
        self.unbroken = self._unbroken()

    def _unbroken(self) -> int:
        """The first step that needs a branch which was not there at all steps before: from it on, drafts are conditional.

        Whether the branch is there then depends on the other rows of the batch; what is drafted for a row must not.
        """
        there: set[str] | None = None
        for step in range(self.total):
            names = {b.name for b in self.run._plan(step, self.total)}
            if there is not None and not names <= there:
                return step
            there = names
        return self.total

    def propose(self, seen: Seen, sample: Sample | None) -> TokenTree:
        self._keep_branches(seen.features)
        features = torch.cat([seen.features[name] for name in self.names])
        device, many, m = features.device, len(self.names), features.shape[1]
        place = self.filled[:, None] + torch.arange(m) + 1 - self.head.config.prefix  # the token after each position
        tokens = seen.tokens.cpu().gather(1, place.clamp(0, seen.tokens.shape[1] - 1)).where(place >= 0, 0).to(device)
        out = self._feed(features, tokens, self.filled, None, self.filled[:, None] + torch.arange(m))
        self.filled = self.filled + seen.fresh.cpu()
        self.steps = seen.counts.cpu()
        last = (seen.fresh - 1).clamp_min(0).to(device).repeat(many)
        self.hidden = out[torch.arange(len(out), device=device), last][:, None]  # of the root, then of what is expanded
        self.expansion, self.depth = Expansion(self.run.batch, device), self.filled.clone()
        first = self._logits(self.hidden, self.steps[:, None])[:, 0]
        root = seen.tokens.to(device).gather(1, (seen.counts.to(device) - 1)[:, None])[:, 0]
        return self.shape.grow(root, first, self._expand, sample)

    def _keep_branches(self, features: Mapping[str, Tensor]) -> None:
        """Only branches that the target has evaluated from the beginning: the others lack features."""
        if self.cache is None:
            self.names = tuple(features)
            length = self.run.room + self.shape.expanded
            self.cache = StaticCache.of(self.head, len(self.names) * self.run.batch, length)
            self.rows = torch.arange(len(self.names) * self.run.batch).view(len(self.names), -1)
        left = [i for i, name in enumerate(self.names) if name in features]
        if not left:
            raise ValueError(f"the guidance went on to other branches ({', '.join(features)}); an EAGLE drafter cannot follow")
        self.names, self.rows = tuple(self.names[i] for i in left), self.rows[left]

    def _feed(self, features: Tensor, tokens: Tensor, start: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        assert self.cache is not None
        many, flat = len(self.names), self.rows.flatten()
        whole = len(flat) == self.cache.store.shape[2]
        begin = int(start[0]) if bool((start == start[0]).all()) else start.repeat(many)
        out: Tensor = self.head(
            features,
            tokens.repeat(many, 1),
            self.cache if whole else self.cache.rows(flat),
            begin,
            None if mask is None else mask.repeat(many, 1, 1, 1),
            positions.clamp_max(self.head.length - 1).repeat(many, 1).to(features.device),
        )
        return out

    def _logits(self, features: Tensor, steps: Tensor) -> Tensor:
        logits = dict(zip(self.names, self.output(features).float().chunk(len(self.names)), strict=True))
        steps = steps.to(features.device)
        if self.unbroken == self.total or "cond" not in logits:
            return self.run.guide(logits, steps, self.total)
        alone = steps >= self.unbroken
        guided = self.run.guide(logits, steps.clamp_max(self.unbroken - 1), self.total)
        return torch.where(alone[..., None], centre(logits["cond"]), guided)

    def _expand(self, tokens: Tensor, parents: Tensor) -> Tensor:
        many, m = len(self.names), tokens.shape[1]
        start = self.filled + self.expansion.count
        look = self.expansion.add(parents)
        above = (parents + 1).repeat(many, 1)[..., None].expand(-1, -1, self.hidden.shape[-1])
        self.steps = self.steps + 1
        out = self._feed(
            self.hidden.gather(1, above), tokens, start, mask_of(look, self.filled), self.depth[:, None].expand(-1, m)
        )
        self.depth = self.depth + 1
        self.hidden = torch.cat([self.hidden, out], 1)
        return self._logits(out, self.steps[:, None].expand(-1, m))


class ModelDrafter:
    """Trees from a smaller network of the same vocabulary and number of tokens, under the target's guidance and conditions.

    Args:
        models: a network, or several by name, as in :class:`genkit.samplers.autoregressive.guided.GuidedLogits`.
        shape: of the trees.
        conditions: of the network, if not the target's.
    """

    def __init__(self, models: Any, shape: Shape = DYNAMIC, conditions: Mapping[str, Any] | None = None) -> None:
        self.models, self.shape, self.conditions = models, shape, conditions
        self.nodes = shape.nodes

    def start(self, run: TreeLogits) -> Proposer:
        conditions = run.conditions if self.conditions is None else self.conditions
        own = TreeLogits(self.models, run.guidance, conditions, run.batch, run.room + self.shape.expanded, trace="none")
        return _ModelRun(own, self.shape)


class _ModelRun:
    def __init__(self, own: TreeLogits, shape: Shape) -> None:
        self.own, self.shape = own, shape
        network = own.model("main")
        self.prefix, self.total, self.last = network.prefix, network.tokens, network.length - 1

    def propose(self, seen: Seen, sample: Sample | None) -> TokenTree:
        device, counts = seen.tokens.device, seen.counts.cpu()
        lengths, end = self.own.lengths, self.prefix + counts
        place = lengths[:, None] + torch.arange(int((end - lengths).max()))
        index = (place - self.prefix).clamp(0, seen.tokens.shape[1] - 1).to(device)
        positions = place.clamp_max(self.last).to(device)
        steps = (place - self.prefix + 1).to(device)
        self.level = 0
        logits = self.own.nodes(seen.tokens.gather(1, index), steps, self.total, positions=positions, ahead=self.shape.levels)
        self.own.rewind(end)
        first = logits[torch.arange(len(logits)), (end - lengths - 1).clamp_min(0).to(device)]
        self.base, self.expansion = end, Expansion(len(end), device)
        root = seen.tokens.gather(1, (seen.counts.to(device) - 1)[:, None])[:, 0]
        tree = self.shape.grow(root, first, self._expand, sample)
        self.own.rewind(end)
        return tree

    def _expand(self, tokens: Tensor, parents: Tensor) -> Tensor:
        look = self.expansion.add(parents)
        place = (self.base + self.level)[:, None].expand(tokens.shape).to(tokens.device)
        self.level += 1
        positions, steps = place.clamp_max(self.last), place - self.prefix + 1
        ahead = self.shape.levels - self.level
        return self.own.nodes(tokens, steps, self.total, mask=mask_of(look, self.base), positions=positions, ahead=ahead)


class CopyDrafter:
    """A chain copied from the row's own tokens: what followed the last ``order`` tokens when they last stood there.

    Where they never did, what stands above in the image is copied. The baseline that needs no network.

    Args:
        order: how many tokens must agree, from 1.
        length: of the chain, from 1.
    """

    def __init__(self, order: int = 2, length: int = 4) -> None:
        if order < 1 or length < 1:
            raise ValueError(f"order={order}, length={length}: give 1 or more")
        self.order, self.length = order, length
        self.nodes = length + 1

    def start(self, run: TreeLogits) -> Proposer:
        return _CopyRun(self, round(run.model("main").tokens ** 0.5))


class _CopyRun:
    def __init__(self, drafter: CopyDrafter, side: int) -> None:
        self.order, self.length, self.side = drafter.order, drafter.length, side
        self.chain = StaticTree.chain(drafter.length).parents()

    def propose(self, seen: Seen, sample: Sample | None) -> TokenTree:
        tokens, parents = [], []
        for row, count in zip(seen.tokens.tolist(), seen.counts.tolist(), strict=True):
            found = self._continuation(row[:count])
            tokens.append([row[count - 1], *found, *[0] * (self.length - len(found))])
            parents.append([above if i <= len(found) else -1 for i, above in enumerate(self.chain)])
        device = seen.tokens.device
        return TokenTree(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))

    def _continuation(self, known: list[int]) -> list[int]:
        end = known[-self.order :]
        starts = range(len(known) - self.order - 1, -1, -1)
        begin = next((i + self.order for i in starts if known[i : i + self.order] == end), len(known) - self.side)
        return known[begin : begin + self.length] if begin >= 0 else []
