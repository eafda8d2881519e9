"""LlamaGen against the official code: weights' names, logits, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import CFG, Guidance, Interval, NoGuidance, parse
from genkit.models.llamagen import LLAMAGEN_FILES, LLAMAGEN_SIZES, LlamaGen, LlamaGenConfig
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits, centre
from genkit.samplers.autoregressive.next_token import generate
from tests.tokenizers.golden import close, layout, read, under

C2I, META = read("llamagen_c2i")
T2I, TEXT_META = read("llamagen_t2i")
GREEDY = Filters(temperature=0)


def config(meta: dict[str, Any]) -> LlamaGenConfig:
    c = meta["config"]
    shape = LlamaGenConfig(c["n_layer"], c["n_head"], c["dim"], c["block_size"], c["vocab_size"], multiple=c["multiple_of"])
    text = {"text_dim": c["caption_dim"]} if "caption_dim" in c else {"num_classes": c["num_classes"]}
    return LlamaGenConfig(**{**vars(shape), **text})


def network(tensors: dict[str, Tensor], meta: dict[str, Any]) -> LlamaGen:
    net = LlamaGen(config(meta))
    net.load_state_dict(under(tensors, "state_dict."))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def classes() -> LlamaGen:
    return network(C2I, META)


@pytest.fixture(scope="module")
def texts() -> LlamaGen:
    return network(T2I, TEXT_META)


def guided(net: LlamaGen, guidance: Guidance, rows: tuple[int, ...] = (0, 1)) -> GuidedLogits:
    index = list(rows)
    if net.num_classes is None:
        cond: Any = {"text": T2I["cond"][index], "text_mask": T2I["emb_masks"][index]}
        uncond = net.null(len(index), cond["text_mask"])
    else:
        cond, uncond = C2I["cond"][index], net.null(len(index))
    return GuidedLogits(net, guidance, {"cond": cond, "uncond": uncond}, len(index), trace="none", seeds=index)


@torch.no_grad()
def forced(run: GuidedLogits, ids: Tensor) -> Tensor:
    """Guided logits along given tokens, one by one."""
    net = run.model("main")
    fed, out = torch.zeros(len(ids), net.prefix, dtype=torch.long), []
    for i in range(ids.shape[1]):
        out.append(run.logits(fed, i, ids.shape[1], tail=1))
        fed = ids[:, i : i + 1]
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", LLAMAGEN_FILES)
def test_weights_have_the_official_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        net = LlamaGen(LLAMAGEN_FILES[name])
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == layout("llamagen", f"{name}.pt")


def test_sizes() -> None:
    with torch.device("meta"):
        count = {s: sum(p.numel() for p in LlamaGen(LLAMAGEN_SIZES[s]).parameters()) / 1e6 for s in ("B", "XL", "3B")}
    assert {s: round(n, 1) for s, n in count.items()} == {"B": 110.9, "XL": 774.7, "3B": 3096.7}


def test_teacher_forcing(classes: LlamaGen) -> None:
    ids = torch.nn.functional.pad(C2I["tf.ids"], (1, 0))
    close(classes(ids, C2I["cond"]).logits, C2I["tf.logits"])


def test_training_gradients_and_dropout(classes: LlamaGen) -> None:
    ids = C2I["tf.ids"]
    logits = classes(torch.nn.functional.pad(ids[:, :-1], (1, 0)), C2I["cond"]).logits
    close(logits, C2I["train.logits"])
    close(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), C2I["train.loss"])
    assert not torch.equal(network(C2I, META).train()(ids, C2I["cond"]).logits, classes(ids, C2I["cond"]).logits)


@pytest.mark.parametrize(("name", "guidance"), [("nocfg", NoGuidance()), ("cfg.interval_-1", CFG(3.0))])
def test_greedy_tokens_of_classes(classes: LlamaGen, name: str, guidance: Guidance) -> None:
    assert torch.equal(generate(guided(classes, guidance), [0, 1], GREEDY), C2I[f"greedy_{name}.ids"])
    close(forced(guided(classes, guidance), C2I[f"greedy_{name}.ids"]), centre(C2I[f"greedy_{name}.logits"]))


def test_the_official_interval_of_n_ends_after_token_n_plus_1(classes: LlamaGen) -> None:
    """cfg_interval counts decoding steps, of which 0 makes the second token."""
    run = guided(classes, Interval(CFG(3.0), 0, 7 + 1, "step"))
    assert torch.equal(generate(run, [0, 1], GREEDY), C2I["greedy_cfg.interval_7.ids"])
    assert run.ledger.nfe == [36 + 9] * 2  # the official code computes 72
    again = guided(classes, Interval(CFG(3.0), 0, 7 + 1, "step"))
    close(forced(again, C2I["greedy_cfg.interval_7.ids"]), centre(C2I["greedy_cfg.interval_7.logits"]))


@pytest.mark.parametrize(("name", "guidance"), [("nocfg", NoGuidance()), ("cfg.interval_-1", CFG(7.5))])
def test_greedy_tokens_of_text(texts: LlamaGen, name: str, guidance: Guidance) -> None:
    assert bool((T2I["emb_masks"] == 0).any()), "nothing is padding here"
    assert torch.equal(generate(guided(texts, guidance), [0, 1], GREEDY), T2I[f"greedy_{name}.ids"])
    close(forced(guided(texts, guidance), T2I[f"greedy_{name}.ids"]), centre(T2I[f"greedy_{name}.logits"]))


def test_sampled_probabilities(classes: LlamaGen, texts: LlamaGen) -> None:
    for net, tensors, meta in ((classes, C2I, META), (texts, T2I, TEXT_META)):
        s = meta["sampled"]
        logits = forced(guided(net, CFG(s["cfg_scale"])), tensors["sampled.ids"])
        close(Filters(s["temperature"], s["top_k"], s["top_p"]).probabilities(logits), tensors["sampled.probs"])


def test_padding_holds_nothing(texts: LlamaGen) -> None:
    changed = torch.where(T2I["emb_masks"].bool()[..., None], T2I["cond"], torch.randn(T2I["cond"].shape))
    ids = torch.zeros(2, 130, dtype=torch.long)
    a, b = (texts(ids, {"text": t, "text_mask": T2I["emb_masks"]}).logits[:, 119:] for t in (T2I["cond"], changed))
    close(a, b, 1e-5)


@pytest.mark.parametrize("parts", [(1, 1, 3, 5, 2), (5, 7)])
def test_positions_together_are_positions_one_by_one(texts: LlamaGen, parts: tuple[int, ...]) -> None:
    condition = {"text": T2I["cond"], "text_mask": T2I["emb_masks"]}
    ids = torch.nn.functional.pad(T2I["sampled.ids"][:, :12], (120, 0))
    whole, cache, out, start = texts(ids, condition).logits, StaticCache.of(texts, 2), [], 0
    for n in (120, *parts):
        out.append(texts(ids[:, start : start + n], condition, cache, start).logits)
        start += n
    close(torch.cat(out, 1), whole, 1e-5)


def test_rows_of_different_length(classes: LlamaGen) -> None:
    ids, cache = torch.nn.functional.pad(C2I["tf.ids"], (1, 0)), StaticCache.of(classes, 2)
    classes(ids[:, :6], C2I["cond"], cache)
    start = torch.tensor([3, 6])
    fed = torch.stack([ids[0, 3:5], ids[1, 6:8]])
    found = classes(fed, C2I["cond"], cache, start).logits
    close(found, torch.stack([C2I["tf.logits"][0, 3:5], C2I["tf.logits"][1, 6:8]]))


def test_a_branch_that_opens_late_is_filled_up(classes: LlamaGen) -> None:
    ids = C2I["tf.ids"][:, :12]
    late = forced(guided(classes, Interval(CFG(3.0), 6, 99, "step")), ids)
    always = forced(guided(classes, CFG(3.0)), ids)
    close(late[:, 6:], always[:, 6:])
    assert float((late[:, :6] - always[:, :6]).abs().max()) > 0.1


@pytest.mark.parametrize(
    "text", ["PAG(2.0)", "SLG(2.0, layers=('layers.0', 'layers.2'))", "ICG(2.0)", "CADS(CFG(2.0), time='progress')"]
)
def test_weakened_layers_and_changed_conditions(classes: LlamaGen, text: str) -> None:
    ids = C2I["tf.ids"][:, :4]
    out = forced(guided(classes, parse(text)), ids)
    assert torch.isfinite(out).all()
    assert float((out - forced(guided(classes, parse(text.replace("2.0", "1.0"))), ids)).abs().max()) > 1e-3


def test_queries_cannot_be_blurred(classes: LlamaGen) -> None:
    with pytest.raises(ValueError, match="use PAG or SLG"):
        forced(guided(classes, parse("SEG(2.0)")), C2I["tf.ids"][:, :1])
    with pytest.raises(ValueError, match=r"layers.0, layers.1, layers.2"):
        forced(guided(classes, parse("SLG(2.0, layers=('mid',))")), C2I["tf.ids"][:, :1])


# ---- the loop ----


def test_a_sample_does_not_depend_on_its_batch(classes: LlamaGen) -> None:
    filters = Filters(0.9, 12, 0.8)
    whole = generate(guided(classes, CFG(3.0)), [5, 6], filters)
    assert torch.equal(generate(guided(classes, CFG(3.0), (1,)), [6], filters), whole[1:])
    assert not torch.equal(generate(guided(classes, CFG(3.0)), [7, 6], filters)[0], whole[0])


def test_given_tokens_stand_and_partial_results_are_shown(classes: LlamaGen) -> None:
    given, seen = torch.full((2, 36), -1), list[Tensor]()
    given[:, 6:12], given[0, 0] = C2I["tf.ids"][:, 6:12], 5
    out = generate(guided(classes, CFG(3.0)), [5, 6], Filters(), given=given, callback=lambda i, t: seen.append(t.clone()))
    assert torch.equal(out[given >= 0], given[given >= 0])
    assert [int((t[0] < 0).sum()) for t in seen] == list(range(35, -1, -1))
    free = generate(guided(classes, CFG(3.0)), [5, 6], Filters())
    assert torch.equal(out[1, :6], free[1, :6])  # before the first given token nothing changes
    assert not torch.equal(out[1, 12:], free[1, 12:])  # behind it the network sees them
    # Around tokens that came by themselves, the same is drawn as without them.
    own = torch.where(given < 0, -1, free)
    assert torch.equal(generate(guided(classes, CFG(3.0)), [5, 6], Filters(), given=own), free)


def test_wrong_arguments(classes: LlamaGen) -> None:
    run = guided(classes, CFG(3.0))
    with pytest.raises(ValueError, match="given of shape"):
        generate(run, [0, 1], given=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="from 0 to 95"):
        generate(run, [0, 1], given=torch.full((2, 36), 96))
    with pytest.raises(ValueError, match=r"filters has 2 entries.*1 sub-tokens"):
        generate(run, [0, 1], [Filters(), Filters()])
    with pytest.raises(ValueError, match="must be a square"):
        LlamaGen(LlamaGenConfig(1, 1, 8, tokens=5))


def test_released_files_are_read(tmp_path: Path, classes: LlamaGen) -> None:
    torch.save({"model": classes.state_dict(), "steps": 3}, tmp_path / "c2i.pt")
    with torch.device("meta"):
        net = LlamaGen(config(META))
    net.load_state(tmp_path / "c2i.pt")
    ids = torch.nn.functional.pad(C2I["tf.ids"], (1, 0))
    close(net(ids, C2I["cond"]).logits, C2I["tf.logits"])
    with pytest.raises(ValueError, match="do not fit this LlamaGen"):
        LlamaGen(config(TEXT_META)).load_state(tmp_path / "c2i.pt")
