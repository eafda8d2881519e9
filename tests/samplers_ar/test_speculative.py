"""Laws of speculative decoding: exact rules keep the target's law, relaxed ones move what they say, rows do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.guidance import APG, CFG, Guidance, Interval, Scheduled
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.samplers.autoregressive.next_token import generate
from genkit.samplers.autoregressive.speculative import (
    Acceptance,
    CopyDrafter,
    Drafter,
    DynamicTree,
    Exact,
    Lantern,
    ModelDrafter,
    StaticTree,
    TokenTree,
    TreeLogits,
    speculate,
    verify,
    verify_greedy,
)
from tests.toys_ar import Sums, conditions

V, ROWS = 4, 20000
WIDE = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0)))
GREEDY = Filters(temperature=0)


class Net(Sums):
    prefix = 1

    def __init__(self, vocabulary: int = 5, tokens: int = 9, seed: int = 0, sharpness: float = 1.0) -> None:
        super().__init__(vocabulary, tokens, seed, sharpness)
        self.tokens, self.parts = tokens, (vocabulary,)


def laws(seed: int) -> tuple[Tensor, Tensor]:
    """p(first) (V,) and p(second | first) (V, V)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=g).softmax(-1), torch.randn(V, V, generator=g).softmax(-1)


def drawn(q: Tensor, count: int, g: torch.Generator) -> Tensor:
    return (q / torch.empty_like(q).exponential_(generator=g)).topk(count).indices


def trees(static: bool) -> tuple[TokenTree, Tensor, Tensor]:
    """Many trees on one context, the target's distribution after each node, and uniforms."""
    g = torch.Generator().manual_seed(1)
    first, after = laws(2)
    draft_first, draft_after = laws(3)
    tokens = torch.zeros(ROWS, WIDE.nodes, dtype=torch.long)
    q = torch.zeros(ROWS, WIDE.nodes, V)
    q[:, 0] = draft_first
    tokens[:, 1:4] = drawn(q[:, 0], 3, g) if static else torch.tensor([2, 0, 3])
    for parent, nodes in ((1, (4, 5)), (2, (6, 7)), (3, (8,))):
        q[:, parent] = draft_after[tokens[:, parent]]
        inner = drawn(q[:, parent], len(nodes), g) if static else draft_after[tokens[:, parent]].topk(len(nodes)).indices
        tokens[:, nodes] = inner
    p = after[tokens]
    p[:, 0] = first
    tree = TokenTree(tokens, torch.tensor(WIDE.parents()).repeat(ROWS, 1), q if static else None)
    return tree, p, 1 - torch.rand(ROWS, WIDE.nodes, generator=g)


def statistic(found: Tensor, law: Tensor) -> float:
    """Chi-square of tokens (N,) under a law (V,)."""
    expected = law * len(found)
    return float(((torch.bincount(found, minlength=V) - expected).square() / expected).sum())


def two_tokens(rule: Acceptance, static: bool) -> tuple[float, float]:
    """The chi-square of the first token, and the largest one of the second given the first."""
    tree, p, uniforms = trees(static)
    verdict = verify(rule, p, tree, uniforms)
    last = drawn(verdict.law, 1, torch.Generator().manual_seed(5))
    new = torch.cat([tree.tokens.gather(1, verdict.path.clamp_min(0))[:, 1:], last], 1)
    new.scatter_(1, verdict.accepted[:, None], last)
    first, after = laws(2)
    more = verdict.accepted > 0
    seconds = [
        statistic(new[more & (new[:, 0] == t), 1], after[t]) for t in range(V) if int((more & (new[:, 0] == t)).sum()) > 99
    ]
    return statistic(new[:, 0], first), max(seconds)


@pytest.mark.parametrize("static", [True, False], ids=["drawn", "chosen"])
def test_exact_keeps_the_law(static: bool) -> None:
    assert max(two_tokens(Exact(), static)) < 21  # 3 degrees of freedom: p = 1e-4
    near = torch.tensor([[1, 2], [0, 2], [3, 0], [2, 0]])
    assert two_tokens(Lantern(2, 0.5, neighbours=near), static)[0] > 60  # and a relaxed rule does not


class Typical:
    """Accept what is not much less probable than the distribution's entropy suggests."""

    def credit(self, p: Tensor, token: Tensor) -> Tensor:
        entropy = -(p * p.clamp_min(1e-30).log()).sum(1)
        return (p.gather(1, token[:, None])[:, 0] > 0.5 * (-entropy).exp()).to(p.dtype)

    def remainder(self, p: Tensor, token: Tensor, q: Tensor | None) -> Tensor:
        return p


def test_a_rule_is_one_small_class() -> None:
    tree, p, uniforms = trees(static=False)
    verdict = verify(Typical(), p, tree, uniforms)
    good = [t for t in (2, 0, 3) if float(Typical().credit(p[:1, 0], torch.tensor([t])))]
    assert good
    assert (tree.tokens.gather(1, verdict.path[:, 1:2]) == good[0]).all()


@pytest.mark.parametrize("static", [True, False], ids=["drawn", "chosen"])
@pytest.mark.parametrize("residual", ["consistent", "official"])
def test_nothing_to_move_is_exact(static: bool, residual: str) -> None:
    tree, p, uniforms = trees(static)
    if residual == "official":  # it empties more as soon as a neighbour has probability zero, as a refused sibling has
        chain = [0, 1, 4]
        q = None if tree.q is None else tree.q[:, chain]
        tree, p = TokenTree(tree.tokens[:, chain], torch.tensor([[-1, 0, 1]]).repeat(ROWS, 1), q), p[:, chain]
    near = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 0, 1]])
    exact = verify(Exact(), p, tree, uniforms)
    for rule in (Lantern(2, 0.0, None, residual, near), Lantern(2, None, 1.0, residual, near)):  # type: ignore[arg-type]
        verdict = verify(rule, p, tree, uniforms)
        assert torch.equal(verdict.path, exact.path)
        torch.testing.assert_close(verdict.law, exact.law)


def test_moved_mass_is_bounded() -> None:
    p = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    token = torch.arange(500) % 64
    rule = Lantern.of(torch.randn(64, 3, generator=torch.Generator().manual_seed(1)), 20, delta=0.2)
    own = p.gather(1, token[:, None])[:, 0]
    moved = rule.credit(p, token) - own
    assert 0.1 < moved.max() <= 0.2
    near, taken, weight = rule.absorbed(p, token)
    torch.testing.assert_close((p.gather(1, near) * taken).sum(1), weight)
    relaxed = p.scatter(1, near, p.gather(1, near) * ~taken).scatter(1, token[:, None], rule.credit(p, token)[:, None])
    torch.testing.assert_close(0.5 * (relaxed - p).abs().sum(1), moved)  # the total variation
    assert (Lantern(20, None, 1.5, neighbours=rule.neighbours).credit(p, token) <= 1.5 * own * (1 + 1e-6)).all()


def test_greedy_takes_the_longest_path() -> None:
    """With all mass of each other's neighbour, both children of the root pass, and the second one has a child that does."""
    p = torch.tensor([[[0.4, 0.3, 0.2, 0.1]] * 5])
    tree = TokenTree(torch.tensor([[3, 0, 1, 2, 0]]), torch.tensor([[-1, 0, 0, 1, 2]]))
    near = torch.tensor([[3], [3], [3], [2]])
    assert verify_greedy(Exact(), p, tree).path.tolist() == [[0, 1, -1]]
    relaxed = verify_greedy(Lantern(1, 0.15, neighbours=near), p, tree)
    assert relaxed.path.tolist() == [[0, 1, -1]]  # 0.3 + 0.1 is no more than 0.4
    p[..., 0], p[..., 2] = 0.35, 0.25
    assert verify_greedy(Lantern(1, 0.15, neighbours=near), p, tree).path.tolist() == [[0, 2, 4]]


DRAFTERS: dict[str, Drafter] = {
    "dynamic": ModelDrafter(Net(seed=1), DynamicTree(9, 3, 3)),
    "static": ModelDrafter(Net(seed=1), WIDE),
    "chain of the target": ModelDrafter(Net(), StaticTree.chain(3)),
    "copy": CopyDrafter(1, 3),
}
GUIDANCES: list[Guidance] = [
    CFG(2.0),
    Interval(CFG(3.0), 2, 5, "step"),
    Interval(CFG(3.0), 4, 9, "step"),
    Scheduled(APG(3.0), "linear"),
]


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_greedy_is_decoding_one_by_one(name: str, guidance: Guidance) -> None:
    label = torch.tensor([0, 1, 2])
    net = Net()
    wanted = generate(GuidedLogits(net, guidance, conditions(label), 3), [0, 1, 2], GREEDY)
    net.calls.clear()
    found, report = speculate(TreeLogits(net, guidance, conditions(label), 3), DRAFTERS[name], [0, 1, 2], GREEDY)
    assert torch.equal(found, wanted)
    assert report.spent == 0
    if name == "chain of the target":
        assert report.mean_length == 4
        assert report.rates == [1, 1, 1]
        assert report.passes.tolist() == [2, 2, 2]
        assert report.accepted[:, 1:].eq(3).all()


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_row_is_the_same_alone(name: str) -> None:
    label, net = torch.tensor([0, 1, 2]), Net()
    rule = Lantern(2, 0.3, neighbours=torch.tensor([[1, 2], [0, 2], [3, 1], [4, 2], [3, 0]]))
    together = speculate(TreeLogits(net, CFG(2.0), conditions(label), 3), DRAFTERS[name], [3, 4, 5], rule=rule)
    for b in range(3):
        alone = speculate(TreeLogits(net, CFG(2.0), conditions(label[b : b + 1]), 1), DRAFTERS[name], [3 + b], rule=rule)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        for key in ("passes", "accepted", "depth"):
            assert torch.equal(getattr(alone.report, key)[0], getattr(together.report, key)[b])


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_sampled_tokens_have_the_targets_law(name: str) -> None:
    """Three tokens of three values: 27 cells, against their probabilities worked out one by one."""
    net, rows = Net(3, 4, sharpness=0.5), 1500
    shape = DynamicTree(6, 2, 2) if name == "dynamic" else StaticTree(((0,), (1,), (0, 0), (1, 0)))
    drafter, guidance = ModelDrafter(Net(3, 4, seed=1), shape), CFG(1.5)
    label = torch.zeros(rows, dtype=torch.long)
    found = speculate(TreeLogits(net, guidance, conditions(label), rows), drafter, range(rows), tokens=3).tokens
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    c, u = (net.full(every[:, :2], torch.full((27,), t)) for t in (0, 3))
    steps = (u + 1.5 * (c - u)).log_softmax(-1)
    law = steps.gather(2, every[..., None])[..., 0].sum(1).exp()
    counts = torch.bincount(found @ torch.tensor([9, 3, 1]), minlength=27)
    assert float(((counts - law * rows).square() / (law * rows)).sum()) < 59  # 26 degrees of freedom: p = 2e-4


def test_report_adds_up() -> None:
    label, shown = torch.tensor([0, 1]), []
    guided = TreeLogits(Net(), CFG(2.0), conditions(label), 2)
    tokens, report = speculate(guided, DRAFTERS["dynamic"], [1, 2], callback=lambda t, n: shown.append((t.clone(), n.clone())))
    assert torch.equal(shown[-1][0], tokens)
    assert shown[0][0].eq(-1).any()
    assert shown[-1][1].tolist() == [9, 9]
    assert report.tested[0] == int(report.passes.sum())
    assert report.mean_length == 1 + sum(report.passed) / report.tested[0]
    assert ((report.depth > 0).sum(1) + report.passes + 1 >= 9).all()
    assert (report.depth[:, 1:] <= report.accepted[:, 1:]).all()
    assert min(report.draft_seconds, report.verify_seconds) > 0
    assert min(guided.ledger.nfe) >= 9


def test_refusals() -> None:
    label = torch.tensor([0])
    with pytest.raises(ValueError, match="remembers"):
        speculate(TreeLogits(Net(), APG(3.0, momentum=-0.5), conditions(label), 1), DRAFTERS["copy"], [0])
    with pytest.raises(ValueError, match="seeds"):
        speculate(TreeLogits(Net(), CFG(3.0), conditions(label), 1), DRAFTERS["copy"], [0, 1])
    with pytest.raises(ValueError, match="give one of them"):
        Lantern(1, 0.1, 2.0)
    with pytest.raises(ValueError, match="k=3"):
        Lantern(3, neighbours=torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="parent"):
        StaticTree(((0,), (2,)))


def test_half_precision_is_warned_of() -> None:
    net = Net().bfloat16()
    with pytest.warns(UserWarning, match="bfloat16"), pytest.raises(RuntimeError):  # the toy itself computes in float64
        speculate(TreeLogits(net, CFG(2.0), conditions(torch.tensor([0])), 1), DRAFTERS["copy"], [0], GREEDY)


def test_drafted_law_without_enough_tokens() -> None:
    """Siblings that could only be drawn with probability zero are no nodes."""
    q = F.one_hot(torch.tensor([[2]]), V).float()
    tree = WIDE.grow(torch.tensor([0]), q[:, 0].log(), lambda t, _: q.expand(1, t.shape[1], V).log(), _draw_without)
    assert tree.parents.tolist() == [[-1, 0, -1, -1, 1, -1, -1, -1, -1]]
    assert tree.tokens[0, [1, 4]].tolist() == [2, 2]


def _draw_without(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    q = logits.softmax(-1)
    return q.topk(count).indices, q
