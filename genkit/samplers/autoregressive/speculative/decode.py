"""The loop of speculative decoding: propose a tree, verify it in one pass of the target, keep the accepted path."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.random import check_seeds, generator
from genkit.samplers.autoregressive.filters import Filters, Race
from genkit.samplers.autoregressive.speculative.acceptance import Acceptance, Exact, Verdict, verify, verify_greedy
from genkit.samplers.autoregressive.speculative.drafters import Drafter, Seen
from genkit.samplers.autoregressive.speculative.stepwise import TreeLogits
from genkit.samplers.autoregressive.speculative.tree import TokenTree, ancestors, attention_mask

STREAM = 4  # of a sample's seed; 3 are the draws of tokens

Callback = Callable[[Tensor, Tensor], None]
"""``callback(tokens, counts)`` after every pass: tokens (B, N), -1 where there is none yet, and how many there are, (B,)."""


@dataclass
class Report:
    """How a run of speculative decoding went. Token maps are (B, N), in the order of the tokens: ``.view(B, side, side)``.

    Attributes:
        passes: (B,) passes of the target in which a row took part, the first one not counted.
        accepted: for each token, how many drafted tokens its pass accepted.
        depth: for each token, its place in the accepted path; 0 where the target drew it itself.
        moved: for each token, the probability that the rule moved to it: its part of the total variation spent.
        tested, passed: by depth from 1 on, how often a path got there with nodes to test, and how often one was accepted.
        draft_seconds, verify_seconds: wall-clock time, each up to the point where its results are on the CPU.
    """

    passes: Tensor
    accepted: Tensor
    depth: Tensor
    moved: Tensor
    tested: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    emitted: int = 0

    @property
    def mean_length(self) -> float:
        """Tokens gained by a pass of the target on average: accepted ones, and the one drawn (LANTERN's step compression).

        As there, what the last pass of a row accepted beyond its end counts too.
        """
        return self.emitted / max(int(self.passes.sum()), 1)

    @property
    def rates(self) -> list[float]:
        """The share of paths that went on, by depth from 1 on."""
        return [p / t for p, t in zip(self.passed, self.tested, strict=True)]

    @property
    def spent(self) -> float:
        """Probability moved by the rule for a token, on average: a total variation, 0 for an exact rule."""
        return float(self.moved.mean())


class Speculation(NamedTuple):
    """Tokens (B, N), and how they came about."""

    tokens: Tensor
    report: Report


@torch.no_grad()
def speculate(
    guided: TreeLogits,
    drafter: Drafter,
    seeds: Sequence[int],
    filters: Filters = Filters(),  # noqa: B008 (immutable)
    rule: Acceptance | None = None,
    *,
    tokens: int | None = None,
    callback: Callback | None = None,
) -> Speculation:
    """Tokens of a network such as :class:`genkit.models.llamagen.LlamaGen`, several in one pass of it.

    With :class:`Exact` they follow the law of :func:`genkit.samplers.autoregressive.next_token.generate` (Leviathan et al. 2023,
    theorem 1); at temperature 0 they are its tokens. Every row accepts as many as its own tree allows.

    Verification is in float32 at least. A network that computes in half precision answers a little differently to one token and
    to a tree of them, and at temperature 0 near-ties then fall differently: a warning says so.

    Args:
        guided: a new run over the batch; it is at its end afterwards. It makes room for the trees itself.
        drafter: what proposes the trees.
        seeds: one integer per sample. The result for a sample depends on its own seed and condition alone.
        filters: temperature (0: the most probable token), top-k and top-p, for target and drafter.
        rule: of acceptance; default :class:`Exact`.
        tokens: how many to make, up to the network's own number (the default).
        callback: called after every pass.

    Raises:
        ValueError: a wrong number of seeds or tokens, a network whose tokens have parts, or a guidance that remembers steps.
    """
    run = _Run(guided, drafter, check_seeds(seeds), filters, Exact() if rule is None else rule, tokens)
    while not run.finished:
        run.advance()
        if callback is not None:
            callback(run.shown(), run.counts.clamp_max(run.wanted))
    return Speculation(run.tokens[:, : run.wanted], run.report)


class _Run:
    """A batch on its way: tokens[b, : counts[b]] are drawn, and all but the last of them the target has seen."""

    def __init__(
        self, guided: TreeLogits, drafter: Drafter, seeds: list[int], filters: Filters, rule: Acceptance, tokens: int | None
    ) -> None:
        network: Any = guided.model("main")
        self.guided, self.seeds, self.filters, self.rule = guided, seeds, filters, rule
        self.total, self.prefix, self.last = network.tokens, network.prefix, network.length - 1
        self.wanted = self.total if tokens is None else tokens
        if not 1 <= self.wanted <= self.total or len(seeds) != guided.batch or len(network.parts) > 1:
            raise ValueError(
                f"tokens={tokens}, {len(seeds)} seeds, {len(network.parts)} parts: give 1 to {self.total} tokens, "
                f"{guided.batch} seeds, and a network whose tokens have one part"
            )
        weight = next(network.parameters())
        if filters.temperature == 0 and weight.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the network computes in {weight.dtype}: greedy tokens may differ from decoding one by one", stacklevel=3
            )
        # Rows that are finished stand at their end while others still verify their trees.
        guided.room = max(guided.room, self.prefix + self.wanted + 2 * drafter.nodes)
        self.device, self.race, self.round, batch = weight.device, Race(seeds), 0, guided.batch
        self.tokens = torch.zeros(batch, self.wanted + drafter.nodes, dtype=torch.long, device=self.device)
        zeros = torch.zeros(batch, self.wanted, dtype=torch.long)
        self.report = Report(torch.zeros(batch, dtype=torch.long), zeros, zeros.clone(), torch.zeros(batch, self.wanted))
        fed = self.tokens.new_zeros(batch, self.prefix)
        first = guided.logits(fed, 0, self.total, tail=1)[:, 0]
        self.tokens[:, 0] = self.race(filters.probabilities(first), 0, 0, 0)
        self.counts = torch.ones(batch, dtype=torch.long)
        self.seen = Seen(self.tokens, self.counts, torch.full((batch,), self.prefix), dict(guided.hidden))
        self.proposer = drafter.start(guided)

    @property
    def finished(self) -> bool:
        return bool((self.counts >= self.wanted).all())

    def shown(self) -> Tensor:
        there = torch.arange(self.wanted) < self.counts[:, None]
        return self.tokens[:, : self.wanted].where(there.to(self.device), -1)

    def advance(self) -> None:
        """One tree, one pass of the target, one more token and those accepted."""
        self.round, self.draws = self.round + 1, 0
        begin = time.perf_counter()
        tree = self.proposer.propose(self.seen, None if self.filters.temperature == 0 else self._sample)
        halfway = time.perf_counter()
        verdict = self._verify(tree)
        active = self.counts < self.wanted
        path = verdict.path.cpu().masked_fill(~active[:, None], -1)
        self.guided.keep(path)
        route = path.clamp_min(0).to(self.device)
        hidden = {n: h.gather(1, route[..., None].expand(-1, -1, h.shape[-1])) for n, h in self.guided.hidden.items()}
        self._account(tree, path, verdict.moved.float().cpu(), active)
        drawn = self.race(verdict.law, self.round, 0, 0)[:, None]
        length = (path >= 0).sum(1).to(self.device)  # the root and what was accepted: as many as are new
        places = self.counts[:, None].to(self.device) + torch.arange(path.shape[1], device=self.device)
        new = torch.cat([tree.tokens.gather(1, route)[:, 1:], drawn], 1).scatter(1, (length - 1).clamp_min(0)[:, None], drawn)
        old = self.tokens.gather(1, places.clamp_max(self.tokens.shape[1] - 1))
        there = torch.arange(path.shape[1], device=self.device) < length[:, None]
        self.tokens.scatter_(1, places.clamp_max(self.tokens.shape[1] - 1), torch.where(there, new, old))
        before, self.counts = self.counts, (self.counts + length.cpu()).clamp_max(self.wanted)
        self.guided.rewind(self.prefix + self.counts - 1)  # a row that has all its tokens stands at its end, not beyond it
        self.seen = Seen(self.tokens, self.counts, self.counts - before, hidden)
        self.report.draft_seconds += halfway - begin
        self.report.verify_seconds += time.perf_counter() - halfway

    def _verify(self, tree: TokenTree) -> Verdict:
        reach = ancestors(tree.parents)
        depth = reach.sum(-1) - 1
        start = self.guided.lengths.to(self.device)[:, None]
        steps = self.counts[:, None].to(self.device) + depth
        mask, positions = attention_mask(reach, self.guided.lengths), (start + depth).clamp_max(self.last)
        logits = self.guided.nodes(tree.tokens, steps, self.total, mask=mask, positions=positions)
        if self.filters.temperature == 0:
            return verify_greedy(self.rule, logits.softmax(-1), tree)
        uniforms = [1 - torch.rand(tree.tokens.shape[1], generator=generator(s, STREAM, self.round)) for s in self.seeds]
        return verify(self.rule, self.filters.probabilities(logits), tree, torch.stack(uniforms).to(logits))

    def _sample(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """An exponential race won by ``count`` tokens: draws without replacement. The key is where in the tree it happens."""
        q = self.filters.probabilities(logits)
        waits = [self._waits(seed, logits.shape[1:]) for seed in self.seeds]
        self.draws += 1
        return (q / torch.stack(waits).to(q)).topk(count).indices, q

    def _waits(self, seed: int, shape: torch.Size) -> Tensor:
        return torch.empty(shape).exponential_(generator=generator(seed, STREAM, self.round, 1, self.draws))

    def _account(self, tree: TokenTree, path: Tensor, moved: Tensor, active: Tensor) -> None:
        """Book the pass. Token counts[b] - 1 + j of a row is node j of its path; the last new token is the target's draw."""
        report, accepted = self.report, (path > 0).sum(1)
        inner = torch.zeros_like(tree.parents, dtype=torch.bool)
        rows, nodes = (tree.parents >= 0).nonzero(as_tuple=True)
        inner[rows, tree.parents[rows, nodes]] = True
        report.passes += active
        report.emitted += int((accepted + 1)[active].sum())
        for b in active.nonzero()[:, 0].tolist():
            many, begin = int(accepted[b]), int(self.counts[b])
            report.accepted[b, begin : begin + many + 1] = many
            room = report.depth[b, begin : begin + many]
            room.copy_(torch.arange(1, many + 1)[: len(room)])
            report.moved[b, begin : begin + many] = moved[b, 1 : many + 1][: len(room)]
            ends = bool(inner[b, path[b, many]])
            for d in range(many + ends):
                while len(report.tested) <= d:
                    report.tested.append(0)
                    report.passed.append(0)
                report.tested[d] += 1
                report.passed[d] += d < many
