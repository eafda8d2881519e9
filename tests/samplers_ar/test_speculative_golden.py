"""Acceptance rules and trees against runs of LANTERN's released code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.samplers.autoregressive.speculative.acceptance import Acceptance, Exact, Lantern, verify, verify_greedy
from genkit.samplers.autoregressive.speculative.tree import StaticTree, TokenTree, ancestors, depths, leaves, paths
from tests.tokenizers.golden import close, read

STATIC = ["lanternpp_static_mc_sim_7b_63", "lanternpp_static_naive_extend_57"]


def warped(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, then top-p, then top-k, as in transformers."""
    z = logits / temperature
    if top_p < 1:
        ordered, index = z.sort(-1)
        z = z.masked_fill(
            (ordered.softmax(-1).cumsum(-1) <= 1 - top_p).scatter(-1, index, ordered.softmax(-1).cumsum(-1) <= 1 - top_p),
            -torch.inf,
        )
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[..., -1:], -torch.inf)
    return z.softmax(-1)


def rule_of(neighbours: Tensor, lantern: bool, k: int, delta: float) -> Acceptance:
    if not lantern:
        return Exact()
    if delta > 1:
        return Lantern(k, None, delta, "official", neighbours)
    return Lantern(k, delta, None, "official", neighbours)


def tree_of(candidates: Tensor) -> tuple[TokenTree, Tensor]:
    """The tree of paths (rows, levels + 1) that share their beginnings, and the node that stands at each of their places."""
    known: dict[tuple[int, ...], int] = {}
    tokens, parents = [], []
    nodes = torch.full_like(candidates, -1)
    for i, row in enumerate(candidates.tolist()):
        for j in range(len(row)):
            if row[j] < 0:
                break
            key = tuple(row[: j + 1])
            if key not in known:
                known[key] = len(tokens)
                tokens.append(row[j])
                parents.append(known.get(key[:-1], -1))
            nodes[i, j] = known[key]
    return TokenTree(torch.tensor([tokens]), torch.tensor([parents])), nodes


def test_one_token() -> None:
    t, meta = read("lantern_accept_single")
    for i in range(meta["n"]):
        rule = rule_of(t["neighbours"], bool(t["lantern"][i]), int(t["k"][i]), float(t["delta"][i]))
        p = warped(t["logits"][i], float(t["temperature"][i]), int(t["top_k"][i]), float(t["top_p"][i]))
        after = warped(t["next_logits"][i], float(t["temperature"][i]), int(t["top_k"][i]), float(t["top_p"][i]))
        x = t["x"][i].reshape(1)
        close(rule.credit(p[None], x)[0], t["acp"][i], 1e-6)
        if isinstance(rule, Lantern):
            assert int(rule.absorbed(p[None], x)[1].sum()) - 1 == t["last_neighbour"][i]
        tree = TokenTree(torch.stack([torch.zeros_like(x), x], 1), torch.tensor([[-1, 0]]))
        verdict = verify(rule, torch.stack([p, after])[None], tree, t["u"][i].reshape(1, 1))
        assert int(verdict.accepted) == t["accepted"][i]
        close(verdict.law[0], t["sample_p"][i], 1e-6)


def test_neighbours_of_a_codebook() -> None:
    t, _ = read("lantern_accept_single")
    near = Lantern.of(t["codebook"], k=62).neighbours
    assert near is not None
    assert torch.equal(near.long(), t["neighbours"])


def test_trees() -> None:
    t, meta = read("lantern_accept_tree")
    for case in meta["cases"]:
        name = case["case"]
        tree, nodes = tree_of(t[f"{name}.candidates"])
        at = [(nodes == i).nonzero()[0] for i in range(tree.tokens.shape[1])]
        logits = torch.stack([t[f"{name}.logits"][i, j] for i, j in at])
        rule = rule_of(t["neighbours"], case["lantern"], case["lantern_k"], case["lantern_delta"])
        p = warped(logits, case["temperature"], case["top_k"], case["top_p"])
        verdict = verify(rule, p[None], tree, t[f"{name}.uniforms"].float()[None])
        assert int(verdict.accepted) == case["accept_length"]
        assert int(verdict.used) == case["uniforms_used"]
        assert verdict.path[0, : case["accept_length"] + 1].tolist() == nodes[case["best"], : case["accept_length"] + 1].tolist()
        close(verdict.law[0], t[f"{name}.sample_p"], 1e-6)
        greedy = verify_greedy(rule, logits.softmax(-1)[None], tree)
        length = case["greedy_accept_length"]
        assert int(greedy.accepted) == length
        assert greedy.path[0, : length + 1].tolist() == nodes[case["greedy_best"], : length + 1].tolist()
        assert int(greedy.law.argmax()) == int(t[f"{name}.greedy_next_logits"].argmax())


@pytest.mark.parametrize("name", STATIC)
def test_static_trees(name: str) -> None:
    t, meta = read(name)
    shape = StaticTree(tuple(tuple(c) for c in meta["tree_choices"]))
    parents = torch.tensor([shape.parents()])
    assert torch.equal(ancestors(parents)[0], t["buffers.tree_attn_mask"][0, 0].bool())
    assert torch.equal(depths(parents)[0], t["buffers.tree_position_ids"])
    routes = paths(parents)[0][leaves(parents)[0]]
    assert sorted(routes.tolist()) == sorted(t["buffers.retrieve_indices"].tolist())
    inner = [sorted({c[:-1] for c in shape.choices if len(c) == level + 1}) for level in range(shape.levels)]
    number = {c: i for i, c in enumerate(((), *shape.choices))}
    for case in meta["cases"]:
        c = case["case"]
        tokens = t[f"{c}.tree_tokens"]
        q = torch.zeros(1, shape.nodes, tokens.max() + 64)[..., :64]
        for level, names in enumerate(inner):
            q[0, [number[n] for n in names]] = t[f"{c}.draft_probs.level{level}"]
        rule = rule_of(t["neighbours"], case["lantern"], case["lantern_k"], case["lantern_delta"])
        p = warped(t[f"{c}.node_logits"], top_k=case["top_k"])
        verdict = verify(rule, p[None], TokenTree(tokens, parents, q), t[f"{c}.uniforms"].float()[None])
        assert int(verdict.accepted) == case["accept_length"], c
        assert int(verdict.used) == case["uniforms_used"]
        best = t["buffers.retrieve_indices"][case["best"], : case["accept_length"] + 1]
        assert verdict.path[0, : case["accept_length"] + 1].tolist() == best.tolist()
        close(verdict.law[0], t[f"{c}.sample_p"], 1e-5)
