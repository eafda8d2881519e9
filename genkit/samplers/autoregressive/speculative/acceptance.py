"""Which drafted tokens the target accepts, and what it draws from where it accepts none.

A rule is a class with two methods: ``credit``, the probability with which the target would take a token, and ``remainder``, the
distribution that remains when it did not. :func:`verify` walks a tree with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.guidance.base import check_count
from genkit.samplers.autoregressive.speculative.tree import TokenTree, children, leaves, paths
from genkit.tokenizers.quantizers import Quantizer, VectorQuantizer

Residual = Literal["consistent", "official"]


class Acceptance(Protocol):
    """A rule of acceptance, on rows of distributions. A token x drafted with probability q(x) passes with credit(x) / q(x)."""

    def credit(self, p: Tensor, token: Tensor) -> Tensor:
        """(R,): the probability the rule gives ``token`` (R,) in place of ``p[token]``, where p (R, V) is the target's."""

    def remainder(self, p: Tensor, token: Tensor, q: Tensor | None) -> Tensor:
        """(R, V): what is drawn from after ``token`` was refused; q (R, V) is its law, None if it was no draw (q(x) = 1)."""


@dataclass(frozen=True)
class Exact:
    """``accept x with p(x) / q(x), else go on with norm(max(0, p - q))``: the target's own law (Leviathan et al. 2023)."""

    def credit(self, p: Tensor, token: Tensor) -> Tensor:
        return _at(p, token)

    def remainder(self, p: Tensor, token: Tensor, q: Tensor | None) -> Tensor:
        left = p.scatter(1, token[:, None], 0.0) if q is None else (p - q).clamp_min(0)
        return _normalized(left, p)


@dataclass(frozen=True, eq=False)
class Lantern:
    """``p~(x) = p(x) + sum of p over the nearest codes of x``, as many as move at most ``delta`` (Jang et al. 2025, LANTERN).

    Codes near each other in the codebook look alike, so x may stand for its neighbours A. With ``factor`` the bound is
    ``p~(x) <= factor p(x)`` (LANTERN++, Park et al. 2025).

    Args:
        k: how many neighbours may be absorbed, from 1 to V - 2. Default 1000.
        delta: the most probability that may move to a token, in total variation, from 0 to 1. None: ``factor`` bounds it.
        factor: lambda, from 1 on. None: ``delta`` bounds it.
        residual: after a refusal, ``"consistent"`` goes on without x and A, as the relaxed distribution says; ``"official"`` as
            the released code, wherever A is not empty: without the k + 1 codes nearest to x, or, if q is known, with all of the
            target's mass on them.
        neighbours: (V, m) integers, the codes nearest to each, nearest first and without itself, m at least k (k + 1 with the
            official residual). None: a pipeline puts in those of its codebook; see also :meth:`of`.

    Raises:
        ValueError: none or both of delta and factor, or one out of its range; too few neighbours; an unknown residual.
    """

    k: int = 1000
    delta: float | None = 0.1
    factor: float | None = None
    residual: Residual = "consistent"
    neighbours: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.delta is None) == (self.factor is None):
            raise ValueError(f"delta={self.delta}, factor={self.factor}: give one of them and None for the other")
        if not (self.factor >= 1 if self.factor is not None else 0 <= (self.delta or 0) <= 1):
            raise ValueError(f"delta={self.delta} must be from 0 to 1, factor={self.factor} from 1 on")
        if self.residual not in get_args(Residual):
            raise ValueError(f"residual={self.residual!r}: use 'consistent' or 'official'")
        check_count(self, "k", 1)
        most = self.k if self.neighbours is None else self.neighbours.shape[1] - (self.residual == "official")
        if self.k > most:
            raise ValueError(f"k={self.k}: give 1 to {most}, the neighbours there are")

    @classmethod
    def of(
        cls,
        codebook: Tensor,
        k: int = 1000,
        delta: float | None = 0.1,
        factor: float | None = None,
        residual: Residual = "consistent",
    ) -> Self:
        """The rule for a codebook (V, d) as it was trained: not normalised, where the tokenizer does that. k from 1 to V - 2."""
        quantizer = VectorQuantizer(*codebook.shape)
        quantizer.embedding.weight = torch.nn.Parameter(codebook.detach().float(), requires_grad=False)
        return cls(k, delta, factor, residual).among(quantizer)

    def among(self, quantizer: Quantizer) -> Self:
        """This rule with the neighbours among the codes of a quantizer.

        Raises:
            ValueError: k is above V - 2.
        """
        if self.k > quantizer.size - 2:
            raise ValueError(f"k={self.k}: give 1 to {quantizer.size - 2}, for a codebook of {quantizer.size}")
        return replace(self, neighbours=quantizer.neighbours(self.k + 1))

    def _near(self, token: Tensor, count: int) -> Tensor:
        if self.neighbours is None:
            raise ValueError("neighbours=None: give this rule those of a codebook, Lantern.of(codebook, ...) or among(quantizer)")
        return self.neighbours.to(token.device)[token, :count].long()

    def absorbed(self, p: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The neighbours (R, k) of each token, which of them it absorbs (R, k), and how much they weigh (R,)."""
        near = self._near(token, self.k)
        total = p.gather(1, near).cumsum(1)
        bound: float | Tensor = 0.0 if self.delta is None else self.delta
        if self.factor is not None:
            bound = (self.factor - 1) * _at(p, token)[:, None]
        taken = total <= bound
        return near, taken, torch.where(taken, total, 0).amax(1)

    def credit(self, p: Tensor, token: Tensor) -> Tensor:
        return _at(p, token) + self.absorbed(p, token)[2]

    def remainder(self, p: Tensor, token: Tensor, q: Tensor | None) -> Tensor:
        near, taken, _ = self.absorbed(p, token)
        if self.residual == "official":
            near = self._near(token, self.k + 1)
            taken = taken.any(1, keepdim=True).expand_as(near)
        area = torch.zeros_like(p, dtype=torch.bool).scatter(1, near, taken)
        if q is None:
            left = p.masked_fill(area, 0).scatter(1, token[:, None], 0.0)
        elif self.residual == "official":
            left = (p - q.masked_fill(area, 0)).clamp_min(0)
        else:  # the relaxed distribution less q: nothing at x, which was refused because q(x) exceeds its credit
            left = (p.masked_fill(area, 0) - q).clamp_min(0).scatter(1, token[:, None], 0.0)
        return _normalized(left, torch.ones_like(p) if self.residual == "official" else p)


class Verdict(NamedTuple):
    """What a target makes of a tree."""

    path: Tensor  # (B, levels + 1): the accepted nodes from the root on, filled up with -1
    accepted: Tensor  # (B,): how many they are, without the root
    law: Tensor  # (B, V): what the next token is drawn from
    moved: Tensor  # (B, levels + 1): probability moved to each node of the path by the rule
    used: Tensor  # (B,): uniforms used


def verify(rule: Acceptance, p: Tensor, tree: TokenTree, uniforms: Tensor) -> Verdict:
    """Walk down the tree: siblings are tested in order, until one is accepted or none is left.

    Args:
        rule: of acceptance.
        p: (B, n, V), the target's distribution after each node, as it is drawn from.
        tree: of n nodes.
        uniforms: (B, m), in (0, 1], one for every test, in the order of testing; n - 1 are always enough.
    """
    kids, rows = children(tree.parents), torch.arange(len(p), device=p.device)
    node = torch.zeros_like(rows)
    law, q = p[:, 0], None if tree.q is None else tree.q[:, 0]
    used, walking, moved = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(p[..., 0])
    while bool(walking.any()):
        arrived = torch.zeros_like(walking)
        for child in kids[rows, node].unbind(1):
            tested = walking & ~arrived & (child >= 0)
            if not bool(tested.any()):
                break
            token = tree.tokens.gather(1, child.clamp_min(0)[:, None])[:, 0]
            credit, u = rule.credit(law, token), uniforms.gather(1, used.clamp_max(uniforms.shape[1] - 1)[:, None])[:, 0]
            taken = tested & (u <= (credit if q is None else credit / _at(q, token)))
            refused = (tested & ~taken)[:, None]
            moved = moved.scatter_add(1, child.clamp_min(0)[:, None], ((credit - _at(law, token)) * taken)[:, None])
            law = torch.where(refused, rule.remainder(law, token, q), law)
            if q is not None:
                q = torch.where(refused, _normalized(q.scatter(1, token[:, None], 0.0), q), q)
            node, arrived, used = torch.where(taken, child, node), arrived | taken, used + tested
        law = torch.where(arrived[:, None], p[rows, node], law)
        q = None if tree.q is None or q is None else torch.where(arrived[:, None], tree.q[rows, node], q)
        walking = walking & arrived
    return _verdict(tree, node, law, moved, used)


def verify_greedy(rule: Acceptance, p: Tensor, tree: TokenTree) -> Verdict:
    """At temperature 0: a node passes if it is the most probable token once its probability is its credit.

    Of the paths that pass, the longest is accepted, the first one of several. The next token is the target's most probable one.

    Args:
        rule: of acceptance.
        p: (B, n, V), the target's distribution after each node, at temperature 1.
        tree: of n nodes.
    """
    (batch, n, size), rows = p.shape, torch.arange(len(p), device=p.device)
    above = p.gather(1, tree.parents.clamp_min(0)[..., None].expand(-1, -1, size)).flatten(0, 1)
    token = tree.tokens.flatten()
    credit = rule.credit(above, token)
    passed = (above.scatter(1, token[:, None], credit[:, None]).argmax(1) == token).view(batch, n) & (tree.parents >= 0)
    passed[:, 0] = True
    moved = (credit - _at(above, token)).view(batch, n).masked_fill(tree.parents < 0, 0)
    route = paths(tree.parents)
    good = (passed.gather(1, route.clamp_min(0).flatten(1)).view_as(route) & (route >= 0)).long().cumprod(2).sum(2)
    first = good.masked_fill(~leaves(tree.parents), 0).argmax(1)  # the first leaf below the longest good path
    node = route[rows, first].gather(1, (good[rows, first] - 1)[:, None])[:, 0]
    law = F.one_hot(p[rows, node].argmax(1), size).to(p.dtype)
    return _verdict(tree, node, law, moved, torch.zeros_like(node))


def _verdict(tree: TokenTree, node: Tensor, law: Tensor, moved: Tensor, used: Tensor) -> Verdict:
    path = paths(tree.parents)[torch.arange(len(node), device=node.device), node]
    spent = moved.gather(1, path.clamp_min(0)).masked_fill(path <= 0, 0)
    return Verdict(path, (path > 0).sum(1), law, spent, used)


def _at(p: Tensor, token: Tensor) -> Tensor:
    return p.gather(1, token[:, None])[:, 0]


def _normalized(mass: Tensor, otherwise: Tensor) -> Tensor:
    """The mass divided by its sum; where none is left, the other one."""
    total = mass.sum(1, keepdim=True)
    mass = torch.where(total > 0, mass, otherwise)
    return mass / mass.sum(1, keepdim=True)
