"""The EAGLE head and whole runs against LANTERN's released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genkit.guidance import CFG, Guidance, Interval
from genkit.models import llama
from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.speculative import (
    Acceptance,
    DynamicTree,
    EagleDrafter,
    Exact,
    Lantern,
    StaticTree,
    TreeLogits,
    speculate,
)
from genkit.samplers.autoregressive.speculative.drafters import Seen
from genkit.samplers.autoregressive.speculative.tree import ancestors, depths, leaves, paths
from tests.tokenizers.golden import close, layout, read, under

GREEDY = Filters(temperature=0)
CFG3 = CFG(3.0)
Models = tuple[dict[str, Tensor], dict[str, Any], LlamaGen, EagleHead]


def head_of(state: dict[str, Tensor], heads: int, tokens: int) -> EagleHead:
    vocabulary, width = state["embed_tokens.weight"].shape
    hidden = state["layers.0.mlp.up_proj.weight"].shape[0]
    head = EagleHead(EagleConfig(width, heads, vocabulary, hidden, tokens, 120)).eval()
    head.load_state_dict(state)
    return head


class _Target(nn.Module):
    """What a drafter needs to know of its target."""

    prefix, tokens, length, parts = 120, 256, 376, (64,)


def test_layout() -> None:
    with torch.device("meta"):
        found = {key: tuple(v.shape) for key, v in EagleHead(EagleConfig()).state_dict().items()}
    assert found == layout("lantern", "llamagen_drafter/pytorch_model.bin")


def test_head_and_trees() -> None:
    t, meta = read("lantern_eagle_drafter")
    head = head_of(under(t, "state_dict."), meta["heads"], meta["grid"] ** 2)
    output = nn.Linear(meta["hidden"], meta["V"], bias=False)
    output.weight = nn.Parameter(t["head.weight"])
    ids = t["input_ids"]
    with torch.no_grad():
        close(head(t["hidden_states"], ids[:, 1:].expand(2, -1)), t["forward.hidden"], 1e-5)
        drafter = EagleDrafter(head, output, DynamicTree(meta["total_tokens"], meta["depth"] + 1, meta["top_k"]))
        run = TreeLogits(_Target(), CFG(meta["cfg_scale"]), {"cond": None, "uncond": None}, 1)
        proposer = drafter.start(run)
        hidden = dict(zip(("cond", "uncond"), t["hidden_states"].split(1), strict=True))
        first = ids.shape[1] - 120
        tree = proposer.propose(Seen(ids[:, 120:], torch.tensor([first]), torch.tensor([ids.shape[1] - 1]), hidden), None)
        _same(tree.tokens, tree.parents, t, "dyn")
        ids = t["step2.input_ids"]
        hidden = dict(zip(("cond", "uncond"), t["step2.hidden_states"].split(1), strict=True))
        tree = proposer.propose(Seen(ids[:, 120:], torch.tensor([first + 2]), torch.tensor([2]), hidden), None)
        _same(tree.tokens, tree.parents, t, "step2")


def _same(tokens: Tensor, parents: Tensor, t: dict[str, Tensor], name: str) -> None:
    assert torch.equal(tokens, t[f"{name}.draft_tokens"])
    assert torch.equal(ancestors(parents)[0], t[f"{name}.tree_mask"][0, 0].bool())
    assert torch.equal(depths(parents)[0], t[f"{name}.position_ids"])
    assert torch.equal(paths(parents)[0][leaves(parents)[0]], t[f"{name}.retrieve_indices"])


def base_of(state: dict[str, Tensor]) -> LlamaGen:
    """LANTERN's copy of LlamaGen carries other names, and a feed-forward of any width."""
    net = LlamaGen(LlamaGenConfig(2, 3, 48, tokens=256, vocabulary=64, text_dim=16, multiple=32)).eval()
    for block in net.layers:
        block.feed_forward.w1, block.feed_forward.w3 = nn.Linear(48, 64, bias=False), nn.Linear(48, 64, bias=False)
        block.feed_forward.w2 = nn.Linear(64, 48, bias=False)
    own = {
        "output.weight": state["lm_head.weight"],
        "norm.weight": state["model.norm.weight"],
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "cls_embedding.uncond_embedding": state["model.cls_embedding.uncond_embedding"],
    }
    own |= {f"cls_embedding.cap_proj.{k}.weight": state[f"model.cls_embedding.cap_proj.{k}.weight"] for k in ("fc1", "fc2")}
    for i in range(2):
        theirs = f"model.layers.{i}."
        qkv = [state[f"{theirs}self_attn.{k}_proj.weight"] for k in "qkv"]
        own |= {
            f"layers.{i}.attention.wqkv.weight": torch.cat(qkv),
            f"layers.{i}.attention.wo.weight": state[f"{theirs}self_attn.o_proj.weight"],
            f"layers.{i}.feed_forward.w1.weight": state[f"{theirs}mlp.gate_proj.weight"],
            f"layers.{i}.feed_forward.w3.weight": state[f"{theirs}mlp.up_proj.weight"],
            f"layers.{i}.feed_forward.w2.weight": state[f"{theirs}mlp.down_proj.weight"],
            f"layers.{i}.attention_norm.weight": state[f"{theirs}input_layernorm.weight"],
            f"layers.{i}.ffn_norm.weight": state[f"{theirs}post_attention_layernorm.weight"],
        }
    net.load_state_dict(own)
    return net


@pytest.fixture(scope="module")
def models() -> Models:
    t, meta = read("lantern_end_to_end")
    return t, meta, base_of(under(t, "base.state_dict.")), head_of(under(t, "drafter.state_dict."), 3, 256)


def run_of(net: LlamaGen, t: dict[str, Tensor], rows: int = 1, guidance: Guidance = CFG3) -> TreeLogits:
    mask = t["caption_mask"]
    valid = int(mask.sum())
    text = torch.roll(t["caption_emb_right_padded"] * mask[..., None], 120 - valid, 1)
    seen = torch.roll(mask, 120 - valid, 1)
    conditions = {
        "cond": {"text": torch.cat([text * (1 - 0.2 * i) for i in range(rows)]), "text_mask": seen.expand(rows, -1)},
        "uncond": net.null(rows, seen.expand(rows, -1)),
    }
    return TreeLogits(net, guidance, conditions, rows)


def padding_as_released(start: Any, n: int, seen: Tensor | None = None, mask: Tensor | None = None, device: Any = None) -> Any:
    """What padding sees in LANTERN: two masks of -3e38 are added, so that it sees what only one of them hides.

    Nothing but the drafter ever reads the features of padding; drafted trees depend on them, and greedy tokens do not.
    """
    look = CAUSAL(start, n, seen, mask, device)
    if seen is None or look is None or mask is not None or start != 0:
        return look
    keys = torch.ones(n, n, dtype=torch.bool).tril() | seen.bool()[:, None]
    return torch.where(seen.bool()[:, None, :, None], look, keys[:, None])


CAUSAL = llama.causal_mask
RUNS = ["exact", "k10_d0.2", "k20_d0.6", "k10_d2.0"]


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs(models: Models, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t, meta, net, head = models
    monkeypatch.setattr(llama, "causal_mask", padding_as_released)
    rule: Acceptance = Exact()
    if name != "exact":
        k, bound = int(name[1:3]), float(name.split("_d")[1])
        delta, factor = (bound, None) if bound <= 1 else (None, bound)
        rule = Lantern(k, delta, factor, "official", t["neighbours"])
    drafter = EagleDrafter(head, net.output, DynamicTree(meta["total_tokens"], meta["depth"] + 1, meta["top_k"]))
    tokens, report = speculate(run_of(net, t), drafter, [0], GREEDY, rule, tokens=36)
    assert torch.equal(tokens, t["spec_exact_ids" if name == "exact" else f"spec_lantern_{name}_ids"])
    assert (report.moved[0] > 0).any() == (name != "exact")
    assert abs(report.mean_length - meta["results"][f"mean_accept_{name}"]) < 0.1  # theirs counts a pass beyond the end


def test_exact_is_greedy_decoding_in_every_row(models: Models) -> None:
    t, _, net, head = models
    drafter = EagleDrafter(head, net.output, DynamicTree(20, 4, 5))
    tokens, report = speculate(run_of(net, t, 3), drafter, [0, 1, 2], GREEDY, tokens=36)
    assert torch.equal(tokens[:1], t["ar_ids"])
    guided, fed = run_of(net, t, 3), torch.zeros(3, 120, dtype=torch.long)
    for i in range(36):
        with torch.no_grad():
            logits = guided.logits(fed, i, 256, tail=1)[:, 0]
        fed = logits.argmax(-1, keepdim=True)
        assert torch.equal(fed[:, 0], tokens[:, i])
    assert len(set(report.passes.tolist())) > 1  # rows accepted different lengths


@pytest.mark.parametrize("first", [0, 6])
def test_a_guidance_for_some_steps(models: Models, first: int) -> None:
    """Where the null branch opens or closes, the drafter goes on with the branches it has seen from the beginning."""
    t, _, net, head = models
    guidance = Interval(CFG3, first, first + 5, "step")
    drafter = EagleDrafter(head, net.output, DynamicTree(12, 3, 4))
    tokens = speculate(run_of(net, t, 2, guidance), drafter, [0, 1], GREEDY, tokens=16).tokens
    guided, fed = run_of(net, t, 2, guidance), torch.zeros(2, 120, dtype=torch.long)
    for i in range(16):
        with torch.no_grad():
            fed = guided.logits(fed, i, 256, tail=1)[:, 0].argmax(-1, keepdim=True)
        assert torch.equal(fed[:, 0], tokens[:, i])


def test_sampled_rows_are_the_same_alone(models: Models) -> None:
    t, _, net, head = models
    drafter = EagleDrafter(head, net.output, StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))))
    rule = Lantern(10, 0.2, neighbours=t["neighbours"])
    filters = Filters(0.9, top_k=20)
    together = speculate(run_of(net, t, 2), drafter, [5, 6], filters, rule, tokens=12)
    alone = speculate(run_of(net, t, 1), drafter, [5], filters, rule, tokens=12)
    assert torch.equal(alone.tokens[0], together.tokens[0])
