"""Speculative decoding through the pipeline: the same images in any batch, exact where it says so, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import genkit
from genkit import DynamicTree, Exact, Filters, Lantern, ModelDrafter, Speculative, StaticTree, TokenPipeline
from genkit.guidance import APG, CFG, Adaptive
from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.open_magvit2_ar import OpenMAGVIT2, OpenMAGVIT2Config
from genkit.pipelines.autoregressive import Partial
from genkit.pipelines.speculative import raw
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.tokenizers.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig
from tests.pipelines.tiny_ar import spread

CONFIG = LlamaGenConfig(2, 2, 16, tokens=16, vocabulary=24, num_classes=3, multiple=8)
TREE = StaticTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
LABELS = [0, 1, 2, 0]


@pytest.fixture(scope="module")
def pipe() -> TokenPipeline:
    torch.manual_seed(0)
    coder = CompactTokenizer(CompactConfig("simvq", 24, 4, 32, image_size=16)).eval()
    head = spread(EagleHead(EagleConfig(16, 2, 24, 16, 16, 1)), 3)
    return TokenPipeline({"main": spread(LlamaGen(CONFIG))}, coder, "toy", drafter=head)


def ways() -> dict[str, Any]:
    small = spread(LlamaGen(replace(CONFIG, layers=1)), 4)
    return {
        "exact": Speculative(tree=DynamicTree(12, 3, 4)),
        "lantern": Speculative(Lantern(k=8, delta=0.3), tree=DynamicTree(12, 3, 4)),
        "copies": Speculative(drafter="ngram"),
        "static": Speculative(0.2, tree=TREE),
        "model": Speculative(drafter=ModelDrafter(small, DynamicTree(8, 3, 3))),
    }


WAYS = ways()
# The null branch closes, opens late, and opens a second time.
GUIDANCES = [
    "CFG(3.0)",
    "Interval(CFG(4.0), 5, 15, 'step')",
    "Sum(Interval(CFG(6.0), 0, 2, 'step'), Interval(CFG(6.0), 6, 15, 'step'))",
]


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_in_any_batch(pipe: TokenPipeline, way: str, guidance: str) -> None:
    whole = pipe(LABELS, guidance=guidance, speculative=WAYS[way])
    parts = pipe(LABELS, guidance=guidance, speculative=WAYS[way], batch_size=1)
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.latents, whole.latents)
    assert parts.speculation is not None
    assert whole.speculation is not None
    assert torch.equal(parts.speculation.passes, whole.speculation.passes)
    assert torch.equal(parts.speculation.accepted, whole.speculation.accepted)
    assert (parts.speculation.tested, parts.speculation.emitted) == (whole.speculation.tested, whole.speculation.emitted)


@pytest.mark.parametrize("guidance", ["none", *GUIDANCES, "Scheduled(CFG(4.0), 'linear', preserve_mean=False)", "APG(4.0)"])
@pytest.mark.parametrize("way", ["exact", "copies", "model"])
def test_greedy_tokens_are_those_of_plain_decoding(pipe: TokenPipeline, way: str, guidance: str) -> None:
    out = pipe(LABELS, guidance=guidance, temperature=0.0, speculative=WAYS[way])
    assert torch.equal(out.tokens, pipe(LABELS, guidance=guidance, temperature=0.0).tokens)


def test_what_it_costs(pipe: TokenPipeline) -> None:
    plain = pipe(LABELS, guidance=2.0)
    assert plain.speculation is None
    assert plain.calls == 16
    itself = Speculative(drafter=ModelDrafter(pipe.network, StaticTree.chain(3)))
    out = pipe(LABELS, guidance=2.0, temperature=0.0, speculative=itself)
    report = out.speculation
    assert report is not None
    assert report.mean_length == 4  # the target drafts for itself: all is accepted
    assert report.passes.tolist() == [4] * 4  # 15 tokens behind the first
    assert out.calls == 5
    assert out.nfe == [2 * (1 + 4 * 4)] * 4
    assert report.rates == [1.0] * 3
    assert report.spent == 0
    assert [row["rows"] for row in out.trace.rows] == [8, *[32] * 4]
    rough = pipe(LABELS, guidance=2.0, speculative=Lantern(k=8, delta=0.5)).speculation
    exact = pipe(LABELS, guidance=2.0, speculative=Exact()).speculation
    assert rough is not None
    assert exact is not None
    assert rough.mean_length > exact.mean_length
    assert rough.spent > 0 == exact.spent


def test_ways_to_write_it(pipe: TokenPipeline) -> None:
    def tokens(speculative: Any) -> Tensor:
        found = pipe([0, 1], guidance=2.0, speculative=speculative).tokens
        assert found is not None
        return found

    exact, rough = tokens(True), tokens(WAYS["lantern"])
    assert torch.equal(tokens(False), tokens(None))
    assert torch.equal(tokens("Exact()"), exact)
    assert torch.equal(tokens(Speculative()), exact)
    assert torch.equal(tokens(0.3), tokens(Lantern(k=22, delta=0.3)))  # as many codes as there are
    assert torch.equal(tokens("Speculative(Lantern(k=8, delta=0.3), tree=DynamicTree(12, 3, 4))"), rough)
    assert torch.equal(tokens("Speculative(tree=3)"), tokens(Speculative(tree=StaticTree.chain(3))))
    assert torch.equal(tokens(Speculative(tree=StaticTree.chain(4))), exact)
    for length in (1, 3):  # how far a rule gets that takes nearly everything
        report = pipe([0, 1], guidance=2.0, speculative=f"Speculative(Lantern(k=22, delta=1.0), tree={length})").speculation
        assert report is not None
        assert len(report.tested) == length
    assert torch.equal(tokens("Speculative(drafter=CopyDrafter(2, 4))"), tokens(WAYS["copies"]))
    given = Lantern.of(pipe.tokenizer.quantize.table(), 8, 0.3)
    assert torch.equal(tokens(given), tokens("Lantern(k=8, delta=0.3)"))
    assert repr(Lantern(k=8, delta=0.3)) == "Lantern(k=8, delta=0.3, factor=None, residual='consistent')"


def test_neighbours_are_those_of_the_codes_as_they_were_trained() -> None:
    torch.manual_seed(0)
    normal = LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1), 1, 32)).quantize
    normal.embedding.weight.data *= torch.linspace(1, 9, 24)[:, None]
    distance = torch.cdist(normal.embedding.weight, normal.embedding.weight).fill_diagonal_(torch.inf)
    assert torch.equal(raw(normal).neighbours(3).long(), distance.topk(3, largest=False).indices)
    assert not torch.equal(raw(normal).neighbours(3), normal.neighbours(3))
    simple = CompactTokenizer(CompactConfig("simvq", 24, 4, 32, image_size=16)).quantize
    assert raw(simple) is simple


def test_partial_images_as_tokens_are_settled(pipe: TokenPipeline) -> None:
    seen: list[Partial] = []
    out = pipe([0, 1, 2], [5, 6, 7], 2.0, speculative=0.4, batch_size=2, callback=seen.append)
    assert out.speculation is not None
    first = [p for p in seen if p.seeds == [5, 6]]
    assert len(first) == int(out.speculation.passes[:2].max())
    for part in (first, seen[len(first) :]):
        assert [p.index for p in part] == sorted({p.index for p in part})
        assert part[-1].index == 15
        for p in part:
            assert p.tokens is not None
            there = (p.tokens >= 0).sum(1)
            assert int(there.min()) == p.index + 1
            rows = torch.tensor([seed - 5 for seed in p.seeds])
            assert out.tokens is not None
            assert torch.equal(p.tokens, torch.where(p.tokens >= 0, out.tokens[rows], -1))
    torch.testing.assert_close(seen[-1].latents, out.latents[2:])
    assert first[0].latents.shape == (2, 3, 16, 16)


def test_progress(pipe: TokenPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe([0, 1], speculative=True, batch_size=1, progress=True)
    assert "/32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": torch.full((1, 16), -1)}, "speculative and given are given, which do not go together"),
        ({"scales": [2.0]}, "speculative and scales are given"),
        ({"filters": [Filters()]}, "speculative and filters are given"),
        ({"speculative": "Lantern(k=23)"}, "k=23: give 1 to 22, for a codebook of 24"),
        ({"speculative": "Lantern(k=0)"}, "k=0 must be an integer from 1 on"),
        ({"speculative": 1.5}, "delta=1.5 must be from 0 to 1"),
        ({"speculative": "fast"}, "speculative: unknown name 'fast'"),
        ({"speculative": [1]}, r"speculative: acceptance=\[1\] must be Exact\(\), Lantern"),
        ({"speculative": "Speculative(drafter='eagle')"}, "drafter='eagle' must be None, 'ngram'"),
        ({"speculative": "Speculative(tree=0)"}, "tree=0 must be StaticTree"),
        ({"speculative": "Speculative(drafter='ngram', tree=DynamicTree())"}, "is for the trees of an EagleHead"),
        ({"guidance": APG(3.0, momentum=-0.5)}, "remembers earlier steps, which drafted tokens do not have"),
        ({"guidance": Adaptive(CFG(3.0), 0.9)}, "remembers earlier steps, which drafted tokens do not have"),
    ],
)
def test_refused(pipe: TokenPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"classes": 0, "guidance": 2.0, "speculative": True} | options))


def test_drafters_of_other_networks_are_refused(pipe: TokenPipeline) -> None:
    with pytest.raises(
        ValueError, match=r"toy has no drafter; load it with drafter='FILE', or use Speculative\(drafter='ngram'\)"
    ):
        replace(pipe, drafter=None)(0, speculative=True)
    for config in (EagleConfig(16, 2, 25, 16, 16, 1), EagleConfig(16, 2, 24, 16, 64, 1), EagleConfig(16, 2, 24, 16, 16, 5)):
        with pytest.raises(ValueError, match=r"drafter is made for vocabulary, .* but toy has \(24, 16, 16, 1\)"):
            pipe(0, speculative=Speculative(drafter=EagleHead(config)))
    other = LlamaGen(replace(CONFIG, vocabulary=25))
    with pytest.raises(
        ValueError, match=r"drafter is made for vocabulary and tokens \(\(25,\), 16\), but toy has \(\(24,\), 16\)"
    ):
        pipe(0, speculative=Speculative(drafter=ModelDrafter(other)))


def test_tokens_in_parts_are_refused() -> None:
    network = spread(OpenMAGVIT2(OpenMAGVIT2Config(1, 1, 2, 16, bits=(2, 3), tokens=4, num_classes=3, multiple=8)))
    coder = OpenMAGVIT2Tokenizer(OpenMAGVIT2TokenizerConfig(5, (2, 3), 32, (1, 1), 1)).eval()
    parts = genkit.TokenPipeline({"main": network}, coder, "toy parts")
    with pytest.raises(ValueError, match="speculative: a token of toy parts has 2 parts"):
        parts(0, speculative="Speculative(drafter='ngram')")


def test_it_moves_with_the_pipeline(pipe: TokenPipeline) -> None:
    moved = replace(pipe, drafter=EagleHead(EagleConfig(16, 2, 24, 16, 16, 1))).to("cpu")
    assert next(moved.drafter.parameters()).device == moved.device  # type: ignore[union-attr]
