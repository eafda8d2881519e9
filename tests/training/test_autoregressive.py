"""The recipes of next-token and next-scale models, of the drafter and of CCA, on tokens of random tokenizers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VARConfig
from genkit.pipelines.exported import load_exported, save_exported
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.training import cca, drafter, next_scale, next_token
from genkit.training.common import Trainer, fingerprint, seeded
from genkit.training.tokens import TeacherForcing, TokenBatches, TokenData, TokenSchedule, encode, load_tokens
from tests.training.test_cifar10_classifier import pack  # noqa: F401 (a fixture)
from tests.training.test_tokenizer import assert_same

SHAPES = {
    "next_token": (
        CompactConfig("simvq", 16, 4, 32, image_size=16),
        lambda: LlamaGen(LlamaGenConfig(2, 2, 16, tokens=16, vocabulary=16, num_classes=4, multiple=16, dropout=0.1)),
    ),
    "next_scale": (
        CompactConfig("multiscale", 16, 4, 32, image_size=16, patch_nums=(1, 2, 4)),
        lambda: VAR(VARConfig(2, 16, 2, (1, 2, 4), 16, 4, 4, shared_adaln=True)),
    ),
}
KINDS = list(SHAPES)
SHORT: dict[str, Any] = {"images": 48, "batch": 8, "warmup": 16}


def made(kind: str) -> tuple[Any, TokenData]:
    """A new network, and 24 images of four kinds as tokens."""
    with seeded(0):
        tokenizer = CompactTokenizer(SHAPES[kind][0]).eval().requires_grad_(False)
        network = SHAPES[kind][1]()
        images = torch.randint(0, 256, (4, 3, 16, 16)).repeat(6, 1, 1, 1).to(torch.uint8)
    return network, TokenData(encode(tokenizer, images), torch.arange(24) % 4, tokenizer, "random")


def run_of(recipe: str, kind: str, out: Path, **settings: Any) -> tuple[Trainer, TokenBatches]:
    network, data = made(kind)
    if recipe == "train":
        schedule: Any = next_token.Recipe(**SHORT | settings)
        run = next_token.trainer(network, data, schedule, out)
    elif recipe == "cca":
        schedule = cca.Recipe(**SHORT | settings)
        run = cca.trainer(network, data, schedule, out)
    else:
        schedule = drafter.Recipe(**SHORT | settings)
        target = network.eval().requires_grad_(False)
        torch.nn.init.normal_(target.output.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        with seeded(0):
            head = drafter.head_for(target)
        run = drafter.trainer(head, target, data, schedule, out)
    return run, TokenBatches(data, schedule)


RUNS = [("train", "next_token"), ("train", "next_scale"), ("cca", "next_token"), ("cca", "next_scale"), ("drafter", "next_token")]


@pytest.mark.parametrize(("recipe", "kind"), RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(recipe: str, kind: str, tmp_path: Path) -> None:
    """With dropout in the network, noise in the drafter's recipe, and dropped labels in all of them."""
    whole, batches = run_of(recipe, kind, tmp_path / "whole")
    whole.run(batches)
    stopped, _ = run_of(recipe, kind, tmp_path / "stopped")
    for _ in range(4):
        stopped.train_step(batches)
    stopped.save()
    torch.manual_seed(123)  # the global generator plays no part
    resumed, batches = run_of(recipe, kind, tmp_path / "stopped")
    assert resumed.step == 4
    resumed.run(batches)
    assert_same(resumed, whole)


@pytest.mark.parametrize(("recipe", "kind"), RUNS)
def test_the_loss_falls(recipe: str, kind: str, tmp_path: Path) -> None:
    more = {"beta": 0.5, "lam": 1.0} if recipe == "cca" else {}
    run, batches = run_of(recipe, kind, tmp_path, images=8 * 40, lr=5e-3, label_dropout=0.0, **more)
    first = [run.train_step(batches) for _ in range(3)]
    run.run(batches)
    with torch.no_grad(), seeded(0):
        last = [float(run.loss(run.ema, *batches(step))) for step in range(1000, 1003)]
    assert sum(last) < 0.9 * sum(first)


def test_the_drafter_keeps_the_targets_embeddings(tmp_path: Path) -> None:
    run, batches = run_of("drafter", "next_token", tmp_path)
    before = run.plain().embed_tokens.weight.clone()
    run.train_step(batches)
    target, _ = made("next_token")
    assert torch.equal(run.plain().embed_tokens.weight, before)
    assert torch.equal(before, target.tok_embeddings.weight)


def test_drafter_loss_is_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    output = torch.nn.Linear(5, 7, bias=False)
    predicted, features = torch.randn(2, 2, 3, 5, generator=g) * 2
    off = (predicted - features).abs()
    regression = torch.where(off < 1, off.square() / 2, off - 0.5).mean()
    p, log_q = output(features).softmax(-1), output(predicted).softmax(-1).log()
    expected = regression - 0.3 * (p * log_q).sum(-1).mean()
    torch.testing.assert_close(drafter.drafter_loss(predicted, features, output, 0.3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_agrees_with_decoding(kind: str) -> None:
    """The likelihood of a sequence is the product of what the network says token by token, or scale by scale, on a cache."""
    network, data = made(kind)
    network.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens, labels = data.tokens[0, :4].long(), torch.tensor([0, 1, 2, 4])
    forced = TeacherForcing(data.tokenizer.quantize)
    cache, total, start = StaticCache.of(network, 4), torch.zeros(4), 0
    with torch.no_grad():
        if kind == "next_token":
            blocks = [(tokens[:, max(i - 1, 0)][:, None], tokens[:, i][:, None]) for i in range(16)]
        else:
            q = data.tokenizer.quantize
            inputs = torch.cat([torch.zeros(4, 1, 4), q.next_inputs(tokens)], 1)
            blocks = [(inputs[:, a:b], tokens[:, a:b]) for a, b in ((0, 1), (1, 5), (5, 21))]
        for given, wanted in blocks:
            logits = network(given, labels, cache, start).logits
            total -= F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1)
            start += given.shape[1]
        torch.testing.assert_close(forced.log_likelihood(network, tokens, labels), total, atol=1e-4, rtol=1e-5)


def test_batches_are_functions_of_seed_and_step() -> None:
    tokens = torch.stack([torch.zeros(4000, 1), torch.ones(4000, 1)]).short()
    data = TokenData(tokens, torch.full((4000,), 3), None, "")
    batches = TokenBatches(data, TokenSchedule(images=4000, batch=2000))
    drawn, labels, dropped = batches(1)
    assert drawn.float().mean().item() == pytest.approx(0.5, abs=0.05)  # half of them mirrored
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (labels == 3).all()
    again = TokenBatches(data, TokenSchedule(images=4000, batch=2000))
    parts = [again(1, rank, 2) for rank in (0, 1)]
    assert all(
        torch.equal(torch.cat(p), whole) for p, whole in zip(zip(*parts, strict=True), (drawn, labels, dropped), strict=True)
    )


def test_mirrored_tokens_are_those_of_mirrored_images() -> None:
    _, data = made("next_token")
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=g).to(torch.uint8)
    both = encode(data.tokenizer, images, batch=2)
    assert torch.equal(both[1], encode(data.tokenizer, images.flip(3))[0])
    assert torch.equal(both[0].long(), data.tokenizer.encode(images.float() / 127.5 - 1).flatten(1))


def test_the_commands(pack: Path, tmp_path: Path) -> None:  # noqa: F811
    """One after the other, each on what the ones before have exported."""
    for kind in ("simvq", "multiscale"):
        with seeded(0):
            tokenizer = CompactTokenizer(CompactConfig(kind, 16, 4, 32, patch_nums=(1, 8)))
        save_exported(tmp_path / f"{kind}.safetensors", tokenizer)
    short = ["--images", "16", "--batch", "8", "--data", str(pack), "--tokens", str(tmp_path / "tokens")]

    def call(module: Any, name: str, tokenizer: str, *more: str) -> SimpleNamespace:
        paths = ["--tokenizer", str(tmp_path / f"{tokenizer}.safetensors"), "--out", str(tmp_path / name)]
        module.main([*short, *paths, "--export", str(tmp_path / f"{name}.safetensors"), *more])
        network, about = load_exported(tmp_path / f"{name}.safetensors")
        assert (about["images"], len(about["history"])) == (16, 1)
        return SimpleNamespace(kind=type(network), about=about)

    small = ["--width", "16", "--heads", "2"]
    token = call(next_token, "token", "simvq", "--layers", "1", *small)
    assert (token.kind, token.about["class_names"][0]) == (LlamaGen, "airplane")
    assert call(next_scale, "scale", "multiscale", "--depth", "1", *small).kind is VAR
    model = ["--model", str(tmp_path / "token.safetensors")]
    call(drafter, "drafter", "simvq", *model)
    assert call(cca, "cca", "simvq", *model).about["reference"] == fingerprint(tmp_path / "token.safetensors")
    call(cca, "cca_scale", "multiscale", "--model", str(tmp_path / "scale.safetensors"))
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # each tokenizer's tokens were made once
    with pytest.raises(ValueError, match="was trained on tokens of"):
        call(cca, "other", "multiscale", *model)
    with pytest.raises(ValueError, match="this recipe needs 'multiscale'"):
        call(next_scale, "other", "simvq")
    with pytest.raises(ValueError, match="this recipe needs one grid of tokens"):
        call(next_token, "other", "multiscale")
    with pytest.raises(FileNotFoundError):
        load_tokens(tmp_path / "none.npz", tmp_path / "simvq.safetensors", tmp_path)
