"""Autoregressive pipelines over tiny random networks: what they return, what it costs, what they refuse."""

import pytest
import torch

from genkit.guidance import CFG, Interval
from genkit.models.flowar import FlowAR, FlowARConfig
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.open_magvit2_ar import OpenMAGVIT2, OpenMAGVIT2Config
from genkit.models.var import VAR, VARConfig
from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.flow_scale import flowar_guidance
from genkit.samplers.autoregressive.next_scale import var_guidance
from genkit.tokenizers.kl import KLAutoencoder, KLConfig
from genkit.tokenizers.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig
from genkit.tokenizers.var_vqvae import VARTokenizer, VARTokenizerConfig

SCALES = (1, 2, 4)


def spread(network):
    """Weights that make conditions and earlier tokens matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def token_pipe():
    torch.manual_seed(0)
    network = LlamaGen(LlamaGenConfig(2, 2, 16, tokens=16, vocabulary=24, num_classes=3, multiple=8))
    coder = LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1), 1, 32)).eval()
    return TokenPipeline({"main": spread(network)}, coder, "toy", class_names=("ant", "bee", "cat"))


@pytest.fixture(scope="module")
def text_pipe():
    torch.manual_seed(0)
    config = LlamaGenConfig(1, 2, 16, tokens=4, vocabulary=24, text_dim=6, text_tokens=5, multiple=8)
    coder = LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1), 1, 32)).eval()

    def encoder(prompts):
        lengths = torch.tensor([min(len(p), 5) for p in prompts])
        mask = torch.arange(5) >= 5 - lengths[:, None]
        text = torch.stack([torch.full((5, 6), float(sum(map(ord, p)) % 13)) for p in prompts])
        return {"text": text * mask[..., None], "text_mask": mask}

    return TokenPipeline({"main": spread(LlamaGen(config))}, coder, "toy text", text_encoder=encoder)


@pytest.fixture(scope="module")
def scale_pipe():
    torch.manual_seed(0)
    network = VAR(VARConfig(2, 16, 2, SCALES, vocabulary=24, code_dim=4, num_classes=3))
    coder = VARTokenizer(VARTokenizerConfig(24, 4, 32, (1, 1), 1, SCALES)).eval()
    return ScalePipeline({"main": spread(network)}, coder, "toy scales", filters=Filters(order="var"))


@pytest.fixture(scope="module")
def flow_pipe():
    torch.manual_seed(0)
    network = FlowAR(FlowARConfig(16, 2, 16, 1, cross=False, heads=2, flow_heads=2, patch_nums=SCALES, channels=4, num_classes=3))
    coder = KLAutoencoder(KLConfig(32, (1, 1), 1, 4)).eval()
    return FlowScalePipeline({"main": spread(network)}, coder, "toy flow")


# ---- what comes out ----


def test_tokens_and_their_image(token_pipe):
    out = token_pipe(["cat", 0], [4, 5], 3.0)
    assert out.tokens.shape == (2, 16)
    assert (out.classes, out.seeds, out.prompts) == ([2, 0], [4, 5], [])
    torch.testing.assert_close(out.latents, token_pipe.tokenizer.decode(out.tokens).detach())
    assert [image.size for image in out.images] == [(8, 8)] * 2
    assert not out.latents.requires_grad


@pytest.mark.parametrize("name", ["token_pipe", "scale_pipe", "flow_pipe"])
def test_an_image_depends_on_its_class_and_seed_alone(name, request):
    pipe = request.getfixturevalue(name)
    options = {"steps": 4} if name == "flow_pipe" else {}
    guidance = flowar_guidance(2.0, 0.9) if options else 2.0
    classes, seeds = [0, 1, 0, 1], [7, 7, 8, 9]
    whole = pipe(classes, seeds, guidance, **options)
    for size in (1, 3):
        parts = pipe(classes, seeds, guidance, batch_size=size, **options)
        torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
        assert parts.nfe == whole.nfe
        if not options:
            assert torch.equal(parts.tokens, whole.tokens)
    assert all((whole.latents[i] - whole.latents[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def test_evaluations(token_pipe, scale_pipe):
    assert token_pipe(0).nfe == [16]  # the class, and 15 of the tokens
    assert token_pipe(0, guidance=2.0).nfe == [32]
    assert scale_pipe(0).nfe == [21]
    assert scale_pipe(0, guidance=2.0).nfe == [42]
    out = scale_pipe([0, 1, 2], guidance=2.0, batch_size=2)
    assert out.calls == 6
    assert [row["rows"] for row in out.trace.rows] == [4, 16, 64, 2, 8, 32]


def test_a_branch_outside_its_interval_costs_nothing(token_pipe, scale_pipe):
    early = Interval(CFG(2.0), 0, 5, unit="step")
    steps = sum("uncond" in row["branches"] for row in token_pipe(0, guidance=early).trace.rows)
    assert 0 < steps < 16
    assert token_pipe(0, guidance=early).nfe == [16 + steps]
    assert scale_pipe(0, guidance=var_guidance(1.5)).nfe == [42]  # the first scale is caught up on
    assert scale_pipe(0, guidance=Interval(CFG(2.0), 0, 0, unit="step")).nfe == [22]
    late = Interval(CFG(2.0), 15, 15, unit="step")
    out = token_pipe(0, guidance=late)
    assert (out.nfe, out.calls) == ([32], 17)  # the last step has one pass for the 15 positions missed, and one of both rows


def test_guidance_changes_tokens(token_pipe):
    free, guided = token_pipe(0, range(4)), token_pipe(0, range(4), "CFG(6.0)")
    assert not torch.equal(free.tokens, guided.tokens)
    assert torch.equal(token_pipe(0, range(4), 1.0).tokens, free.tokens)


def test_filters(token_pipe, scale_pipe):
    greedy = token_pipe(0, [1, 2], temperature=0.0)
    assert torch.equal(greedy.tokens[0], greedy.tokens[1])
    assert torch.equal(token_pipe(0, [1, 2], top_k=1).tokens, greedy.tokens)
    assert torch.equal(token_pipe(0, [1, 2], filters=Filters(top_k=1)).tokens, greedy.tokens)
    assert torch.equal(scale_pipe(0, [1], top_k=1).tokens, scale_pipe(0, [2], top_p=1e-6).tokens)


def test_given_tokens_stay(token_pipe, scale_pipe):
    for pipe, length in ((token_pipe, 16), (scale_pipe, 21)):
        given = torch.full((3, length), -1)
        given[:, ::3] = torch.arange(3)[:, None]
        out = pipe([0, 1, 2], given=given, batch_size=2)
        assert torch.equal(out.tokens[:, ::3], given[:, ::3])
        with pytest.raises(ValueError, match=rf"given of shape \(3, {length}\) must be \(1, {length}\)"):
            pipe(0, given=given)


# ---- streaming ----


@pytest.mark.parametrize(("name", "steps"), [("token_pipe", 16), ("scale_pipe", 3), ("flow_pipe", 3)])
def test_partial_images(name, steps, request):
    pipe, seen = request.getfixturevalue(name), []
    out = pipe([0, 1, 2], [5, 6, 7], batch_size=2, callback=seen.append)
    assert [(p.index, p.total, p.seeds) for p in seen] == [(i, steps, seeds) for seeds in ([5, 6], [7]) for i in range(steps)]
    torch.testing.assert_close(torch.cat([seen[steps - 1].latents, seen[-1].latents]), out.latents)
    assert seen[0].latents.shape == out.latents[:2].shape
    assert not torch.equal(seen[0].latents, seen[steps - 1].latents)
    assert len(seen[0].images) == 2
    if name == "token_pipe":
        assert (seen[3].tokens >= 0).sum(1).tolist() == [4, 4]


def test_progress(token_pipe, capsys):
    token_pipe(0, progress=True)
    assert "/16" in capsys.readouterr().err


# ---- text ----


def test_prompts(text_pipe):
    out = text_pipe(prompt=["a cat", "sky"], seeds=[1, 2], guidance=2.0)
    assert (out.prompts, out.classes, out.seeds) == (["a cat", "sky"], [], [1, 2])
    assert torch.equal(text_pipe(prompt=["a cat", "sky"], seeds=[1, 2], guidance=2.0, batch_size=1).tokens, out.tokens)
    assert out.nfe == [2 * 8] * 2  # the prefix of 5, and 3 of the tokens
    assert text_pipe(prompt="sky", seeds=[1, 2]).prompts == ["sky"] * 2
    features = text_pipe.text_encoder(["a cat", "sky"])
    assert torch.equal(text_pipe(prompt=features, seeds=[1, 2], guidance=2.0).tokens, out.tokens)


def test_clip_embeddings():
    network = spread(VAR(VARConfig(1, 16, 2, SCALES, vocabulary=24, code_dim=4, text_dim=6)))
    coder = VARTokenizer(VARTokenizerConfig(24, 4, 32, (1, 1), 1, SCALES)).eval()
    pipe = ScalePipeline({"main": network}, coder, "toy clip", filters=Filters())
    embeddings = torch.eye(6)[:2]
    out = pipe(prompt=embeddings, seeds=3, guidance=2.0)
    assert out.nfe == [42] * 2
    assert not torch.equal(out.tokens[0], out.tokens[1])
    pipe.text_encoder = lambda prompts: embeddings[: len(prompts)]
    assert torch.equal(pipe(prompt=["a", "b"], seeds=3, guidance=2.0).tokens, out.tokens)


# ---- Open-MAGVIT2's tokens in parts ----


def test_tokens_in_parts():
    torch.manual_seed(0)
    network = spread(OpenMAGVIT2(OpenMAGVIT2Config(1, 1, 2, 16, bits=(2, 3), tokens=4, num_classes=3, multiple=8)))
    coder = OpenMAGVIT2Tokenizer(OpenMAGVIT2TokenizerConfig(5, (2, 3), 32, (1, 1), 1)).eval()
    pipe = TokenPipeline({"main": network}, coder, "toy parts")
    out = pipe([0, 1], guidance=2.0, scales=(1.5, 2.5), filters=[Filters(top_k=4), Filters(top_k=8)])
    assert out.tokens.shape == (2, 4)
    assert int(out.tokens.max()) < 32
    with pytest.raises(ValueError, match="top_k=5 is larger than the vocabulary of 4"):
        pipe(0, filters=[Filters(top_k=5), Filters()])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 3}, "classes contains 3: use an index from 0 to 2 or a name"),
        ({"classes": "bees"}, "which toy does not know; did you mean 'bee'"),
        ({"classes": []}, "classes is empty"),
        ({"classes": [0, 1], "seeds": [1, 2, 3]}, "seeds has 3 entries but classes has 2"),
        ({"prompt": "a bee"}, "prompt='a bee': toy takes classes"),
        ({}, "classes=None: toy takes classes"),
        ({"classes": 0, "top_k": 25}, "top_k=25 is larger than the vocabulary of 24"),
        ({"classes": 0, "top_k": 3, "filters": Filters()}, "filters and top_k are given"),
        ({"classes": 0, "filters": [Filters(), Filters()]}, "filters has 2 entries"),
        ({"classes": 0, "temperature": -1.0}, "temperature"),
        ({"classes": 0, "batch_size": 0}, "batch_size=0: use a positive integer"),
        ({"classes": 0, "guidance": Interval(CFG(2.0), 0.1, 2.0)}, "noise levels"),
        ({"classes": 0, "guidance": "FDG((2.0, 3.0))"}, "logits do not have"),
    ],
)
def test_refused(token_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        token_pipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes=0: toy text takes text: prompt="),
        ({}, "prompt=None: toy text takes text"),
        ({"prompt": ["a", 3]}, "prompt contains 3: give texts"),
        ({"prompt": ["a", "b"], "seeds": [1, 2, 3]}, "give one seed per prompt"),
        ({"prompt": torch.zeros(1, 4, 6)}, r"needs 'text' of shape \(B, 5, 6\)"),
    ],
)
def test_refused_text(text_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        text_pipe(**options)


def test_a_prompt_without_an_encoder(text_pipe):
    from dataclasses import replace

    with pytest.raises(ValueError, match="toy text has no text encoder; load it with text_encoder="):
        replace(text_pipe, text_encoder=None)(prompt="sky")
