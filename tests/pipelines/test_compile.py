"""pipe.compile(): the same images, nothing compiled anew from step to step."""

import copy
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import genkit
from genkit.attention import overrides
from genkit.guidance.base import Perturbation
from genkit.models.compiled import MOST_SHAPES, Compiled, compile_regions, regions_of
from genkit.models.flowar import FlowAR, FlowARConfig
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.open_magvit2_ar import OpenMAGVIT2, OpenMAGVIT2Config
from genkit.models.var import VAR, VARConfig
from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.pipelines.diffusers_pipeline import DiffusersPipeline
from genkit.tokenizers.kl import KLAutoencoder, KLConfig
from genkit.tokenizers.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig
from genkit.tokenizers.var_vqvae import VARTokenizer, VARTokenizerConfig
from tests.pipelines import tiny_diffusers
from tests.pipelines.tiny_ar import spread

SCALES = (1, 2, 4)
CLASSES, SEEDS = [1, 2], [0, 1]
PIPES = ("token", "text", "parts", "scale", "flow", "class")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(kind):
    torch.manual_seed(0)
    if kind == "class":
        return genkit.load("builtin/cifar10")
    if kind == "scale":
        config = VARConfig(2, 16, 2, SCALES, 24, 4, 3)
        return ScalePipeline({"main": spread(VAR(config))}, VARTokenizer(VARTokenizerConfig(24, 4, 32, (1, 1), 1, SCALES)).eval())
    if kind == "flow":
        config = FlowARConfig(16, 2, 16, 1, cross=False, heads=2, flow_heads=2, patch_nums=SCALES, channels=4, num_classes=3)
        return FlowScalePipeline({"main": spread(FlowAR(config))}, KLAutoencoder(KLConfig(32, (1, 1), 1, 4)).eval())
    if kind == "parts":
        coder = OpenMAGVIT2Tokenizer(OpenMAGVIT2TokenizerConfig(6, (2, 4), 32, (1, 1), 1)).eval()
        config = OpenMAGVIT2Config(2, 1, 2, 16, tokens=4, bits=(2, 4), num_classes=3, multiple=8)
        return TokenPipeline({"main": spread(OpenMAGVIT2(config))}, coder)
    text = {"text_dim": 6, "text_tokens": 5} if kind == "text" else {"num_classes": 3}
    network = spread(LlamaGen(LlamaGenConfig(2, 2, 16, tokens=4, vocabulary=24, multiple=8, **text)))
    return TokenPipeline({"main": network}, LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1), 1, 32)).eval())


def draw(pipe, guidance=2.0, rows=2, **options):
    if pipe.num_classes is None:
        features = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
        return pipe(prompt=features[:rows], seeds=SEEDS[:rows], guidance=guidance, **options)
    if hasattr(pipe, "image_shape") and not hasattr(pipe, "tokenizer"):
        options = {"steps": 3, **options}
    return pipe(classes=CLASSES[:rows], seeds=SEEDS[:rows], guidance=guidance, **options)


def compared(out, wanted, tolerance=1e-4):
    if wanted.tokens is not None:
        assert torch.equal(out.tokens, wanted.tokens)
    assert (out.latents - wanted.latents).abs().max() <= tolerance
    assert out.nfe == wanted.nfe


@pytest.mark.parametrize("kind", PIPES)
def test_images_stay_and_nothing_is_compiled_anew(kind):
    pipe, counter = build(kind), CompileCounter()
    wanted = draw(pipe)
    assert pipe.compile(counter) is pipe
    compared(draw(pipe), wanted)
    first = counter.frame_count
    expected = {"token": 1, "text": 1, "parts": 2, "scale": 1, "flow": len(SCALES), "class": 1}[kind]
    assert first == expected, "one graph for each region (and scale of a flow), whatever the number of steps and blocks"
    compared(draw(pipe), wanted)
    pipe.compile(counter)  # once more changes nothing
    compared(draw(pipe, steps=5) if kind == "class" else draw(pipe), draw(build(kind), steps=5) if kind == "class" else wanted)
    assert counter.frame_count == first


@pytest.mark.parametrize("kind", ["token", "scale", "class"])
def test_rows_that_come_and_go_compile_once_for_each_number(kind):
    guidance = "Interval(CFG(2.0), 0.0, 0.7, unit='step')" if kind != "class" else "Interval(CFG(2.0), 0.28, 5.42)"
    options = {"steps": 8} if kind == "class" else {}
    wanted, counter = draw(build(kind), guidance, **options), CompileCounter()
    pipe = build(kind).compile(counter)
    compared(draw(pipe, guidance, **options), wanted)
    first = counter.frame_count
    assert first in (1, 2)  # both branches, and one, where not the same graph serves for them
    compared(draw(pipe, guidance, **options), wanted)
    assert counter.frame_count == first


@pytest.mark.parametrize(
    ("kind", "guidance"), [("token", "PAG(30.0)"), ("scale", "SLG(2.0)"), ("scale", "SEG(30.0)"), ("class", "PAG(2.0)")]
)
def test_weakened_layers_run_as_they_are(kind, guidance):
    wanted = draw(build(kind), guidance)
    compared(draw(build(kind).compile(CompileCounter()), guidance), wanted)
    assert (draw(build(kind), None).latents - wanted.latents).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dit", "sd15", "pixart"])
def test_diffusers_models(name):
    raw = copy.deepcopy(getattr(tiny_diffusers, name)())
    pipe, counter = DiffusersPipeline(raw), CompileCounter()
    given = {"class_labels": [1, 2]} if name == "dit" else {"prompt": ["a cat", "a dog"]}

    def images(guidance="CFG(3.0)", steps=3):
        return pipe(**given, guidance=guidance, num_inference_steps=steps, output_type="latent", seeds=[0, 1]).images

    wanted, weakened = images(), images("PAG(2.0)") if name == "dit" else None
    pipe.compile(counter)
    assert (images() - wanted).abs().max() <= 1e-4
    first = counter.frame_count
    assert first > 0
    images(steps=5)
    assert counter.frame_count == first
    if weakened is not None:
        assert (images("PAG(2.0)") - weakened).abs().max() <= 1e-4
    pipe.compile(None)
    assert torch.equal(images(), wanted)


@pytest.mark.parametrize("guidance", ["CFG(3.0)", "PAG(2.0)"])
def test_pipelines_of_diffusers_guide_a_network_that_is_compiled(guidance):
    raw, counter = copy.deepcopy(tiny_diffusers.sd15()), CompileCounter()

    def images():
        source = torch.Generator().manual_seed(0)
        with genkit.attach(raw, guidance):
            return raw("a cat", num_inference_steps=3, output_type="latent", generator=source).images

    wanted = images()
    DiffusersPipeline(raw).compile(counter)
    assert (images() - wanted).abs().max() <= 1e-4
    assert counter.frame_count == 1  # a weakened network runs as it is


@pytest.mark.parametrize("kind", ["token", "class"])
def test_set_attention_reaches_all_networks_of_a_pipeline(kind):
    pipe = build(kind)
    pipe.models["weak"] = copy.deepcopy(pipe.models["main"])
    for backend in ("reference", None):
        genkit.set_attention(pipe, backend)
        for model in (pipe.models["main"], pipe.models["weak"]):
            found = overrides(getattr(model, "network", model))
            assert set(found.values()) == ({backend} if backend else set())


def test_compile_none_undoes_it():
    pipe, counter = build("token"), CompileCounter()
    pipe.compile(counter).compile(None)
    draw(pipe)
    assert counter.frame_count == 0
    assert not [m for m in pipe.network.modules() for v in vars(m).values() if isinstance(v, Compiled)]


def test_undoing_puts_back_what_stood_in_the_place_of_the_method():
    network = build("token").network

    def hook(*args):
        return type(network).step(network, *args)

    network.step = hook  # as offloading does
    compile_regions(network, CompileCounter())
    compile_regions(network, "eager")
    compile_regions(network, None)
    assert network.step is hook


def test_weakened_layers_count_in_what_others_compiled():
    network, inputs = build("scale").network, torch.zeros(1, 1, 4)
    weaken = Perturbation("skip", ("blocks.0", "blocks.1"))
    with torch.no_grad():
        plain = network(inputs, torch.tensor([1])).logits
        with network.perturbed(weaken):
            wanted = network(inputs, torch.tensor([1])).logits
        assert (plain - wanted).abs().max() > 1e-3
        compiled = torch.compile(network, backend="eager")
        torch.testing.assert_close(compiled(inputs, torch.tensor([1])).logits, plain)
        with network.perturbed(weaken):
            torch.testing.assert_close(compiled(inputs, torch.tensor([1])).logits, wanted)
        torch.testing.assert_close(compiled(inputs, torch.tensor([1])).logits, plain)


def test_another_backend_takes_the_place_of_the_first():
    pipe, first, second = build("scale"), CompileCounter(), CompileCounter()
    pipe.compile(first).compile(second)
    draw(pipe)
    assert (first.frame_count, second.frame_count) == (0, 1)


def test_copies_compile_their_own_weights():
    counter = CompileCounter()
    pipe = build("token").compile(counter)
    wanted = draw(pipe).tokens
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.network.output.weight.neg_()
    assert not torch.equal(draw(other).tokens, wanted)
    assert torch.equal(draw(pipe).tokens, wanted)


def test_gradients_flow_as_without():
    network = build("token").network
    compile_regions(network, CompileCounter())
    network(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1])).logits.square().sum().backward()
    assert network.output.weight.grad.abs().sum() > 0


def test_too_many_shapes_run_without():
    counter = CompileCounter()
    network = build("token").network
    compile_regions(network, counter)

    @torch.no_grad()
    def feed(rows):
        assert network(torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.long)).logits.shape[0] == rows

    for rows in range(1, MOST_SHAPES + 1):
        feed(rows)
    with pytest.warns(UserWarning, match=r"LlamaGen.step is compiled for 8 shapes"):
        feed(MOST_SHAPES + 1)
    assert counter.frame_count == MOST_SHAPES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(MOST_SHAPES + 2)


def test_what_cannot_be_compiled_says_so():
    def broken(graph, inputs):
        raise NotImplementedError("no such device")

    pipe = build("token").compile(broken)
    with pytest.raises(
        RuntimeError, match=r"(?s)LlamaGen\.step cannot be compiled here: .*no such device.*compile\(backend=None\)"
    ):
        draw(pipe)
    pipe.models["extra"] = object()
    with pytest.raises(ValueError, match=r"networks of torch .*object"):
        pipe.compile()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'nonsense'"):
        build("token").compile("nonsense")


def test_speculative_decoding_uses_the_compiled_step():
    from genkit.training.drafter import head_for

    torch.manual_seed(0)
    pipe = build("token")
    pipe.drafter = spread(head_for(pipe.network))
    wanted = draw(pipe, speculative=True)
    compared(draw(pipe.compile(CompileCounter()), speculative=True), wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["token", "scale"])
def test_inductor(kind):
    wanted = draw(build(kind))
    pipe = build(kind).compile()
    compared(draw(pipe), wanted)
    step = next(iter(regions_of(pipe.network)))
    assert vars(step.owner)[step.method].freeze == (kind == "token")
