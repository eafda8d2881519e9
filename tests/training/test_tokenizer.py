"""The tokenizer recipe on a tiny set: every quantizer learns, resumes bit for bit, and is exported whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from genkit.pipelines.exported import load_exported, save_exported
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.training import tokenizer as recipe_module
from genkit.training.common import Trainer
from genkit.training.tokenizer import Batches, Learner, Recipe, quality, trainer
from tests.training.test_cifar10_classifier import pack  # noqa: F401 (a fixture)

SHAPES = {
    "vq": CompactConfig("vq", 16, 4, 32, image_size=8),
    "simvq": CompactConfig("simvq", 16, 4, 32, image_size=8),
    "lfq": CompactConfig("lfq", 16, 4, 32, image_size=8),
    "multiscale": CompactConfig("multiscale", 16, 4, 32, image_size=8, patch_nums=(1, 2)),
}
SHORT = Recipe(images=48, batch=8, warmup=16, revive=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    g = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 256, (24, 3, 2, 2), generator=g)
    return flat.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def assert_same(a: Trainer, b: Trainer) -> None:
    moments = [{f"{i}.{k}": v for i, s in t.optimizer.state_dict()["state"].items() for k, v in s.items()} for t in (a, b)]
    for left, right in ((a.plain().state_dict(), b.plain().state_dict()), (a.ema.state_dict(), b.ema.state_dict()), moments):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_resumed_run_is_the_uninterrupted_one(images: Tensor, tmp_path, kind: str) -> None:
    whole = trainer(SHAPES[kind], SHORT, tmp_path / "whole")
    whole.run(Batches(images, SHORT))
    assert (whole.step, whole.seen) == (6, 48)
    stopped = trainer(SHAPES[kind], SHORT, tmp_path / "stopped")
    for _ in range(4):
        stopped.train_step(Batches(images, SHORT))
    stopped.save()
    torch.manual_seed(123)  # the global generator plays no part
    resumed = trainer(SHAPES[kind], SHORT, tmp_path / "stopped")
    assert_same(resumed, stopped)
    resumed.run(Batches(images, SHORT))
    assert_same(resumed, whole)


@pytest.mark.parametrize("kind", ["simvq", "multiscale"])
def test_it_learns(images: Tensor, tmp_path, kind: str) -> None:
    recipe = Recipe(images=8 * 60, batch=8, warmup=16, lr=3e-3, revive=10)
    run = trainer(SHAPES[kind], recipe, tmp_path)
    before = quality(run.ema.tokenizer, images)
    run.run(Batches(images, recipe))
    after = quality(run.ema.tokenizer, images)
    assert after["psnr"] > before["psnr"] + 1
    assert 1 / 16 < after["usage"] <= 1
    assert 1 < after["perplexity"] <= 16 * after["usage"] + 1e-6


def test_quality_is_what_it_says() -> None:
    """Against a tokenizer that paints everything black, and uses one code."""

    class Black(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.quantize = CompactTokenizer(SHAPES["vq"]).quantize

        def encode(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 4), 3)

        def decode(self, indices: Tensor) -> Tensor:
            return torch.full((len(indices), 3, 8, 8), -1.0)

    images = torch.full((5, 3, 8, 8), 51, dtype=torch.uint8)  # a fifth of the range: error 0.2 of the peak
    measured = quality(Black(), images, batch=2)  # type: ignore[arg-type]
    assert measured == {
        "psnr": pytest.approx(-20 * torch.tensor(0.2).log10().item(), abs=1e-3),
        "usage": 1 / 16,
        "perplexity": 1.0,
    }


def test_codes_nobody_chooses_are_moved_to_latents(images: Tensor) -> None:
    learner = Learner(CompactTokenizer(SHAPES["vq"]), revive=3).train()
    codebook = learner.tokenizer.quantize.get_submodule("embedding").weight
    with torch.no_grad():
        codebook[1:] = 1000.0  # out of reach
    x = images.float() / 127.5 - 1
    with torch.random.fork_rng():
        for _ in range(2):
            learner(x)
        assert (codebook[1:] == 1000).all()
        learner(x)
    rows = learner.tokenizer.features(x).detach().movedim(1, -1).flatten(0, -2)
    distance = (codebook[1:, None] - rows).square().sum(-1)
    assert distance.amin(1).max() < 1e-10
    assert not learner.idle.any()
    assert Learner(CompactTokenizer(SHAPES["simvq"]), revive=3).revive == 0  # its codes move together


@pytest.mark.parametrize("kind", SHAPES)
def test_export_keeps_the_tokens(images: Tensor, tmp_path, kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = CompactTokenizer(SHAPES[kind]).half().float().eval()
    save_exported(tmp_path / "t.safetensors", made, {"images": 3})
    read, about = load_exported(tmp_path / "t.safetensors", "genkit-tokenizer-1")
    assert (read.config, about["images"]) == (made.config, 3)
    x = images[:4].float() / 127.5 - 1
    indices = made.encode(x)
    assert indices.flatten(1).shape == (4, made.length)
    assert torch.equal(indices, read.encode(x))
    assert torch.equal(made.decode(indices), read.decode(indices))
    assert made.decode(indices).shape == x.shape


def test_bad_settings_and_files_are_named(tmp_path) -> None:
    for bad, text in (
        ({"quantizer": "rq"}, "use one of vq, simvq, lfq, multiscale"),
        ({"quantizer": "lfq"}, "give size=65536"),
        ({"channels": 33}, "channels that 32 divides"),
        ({"quantizer": "multiscale", "patch_nums": (1, 2)}, "last side must be 8"),
    ):
        with pytest.raises(ValueError, match=text):
            CompactConfig(**bad)
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_exported(path)
    with pytest.raises(ValueError, match="network is a Linear"):
        save_exported(path, torch.nn.Linear(2, 2))
    save_exported(path, CompactTokenizer(SHAPES["vq"]))
    with pytest.raises(ValueError, match="needed is 'genkit-next-token-1'"):
        load_exported(path, "genkit-next-token-1")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_exported(path)


def test_the_command(pack, tmp_path, capsys) -> None:  # noqa: F811
    file = tmp_path / "assets" / "tokenizer.safetensors"
    options = ["--data", str(pack), "--out", str(tmp_path / "run"), "--export", str(file), "--hardware", "a test"]
    options += ["--quantizer", "multiscale", "--patch-nums", "1", "8", "--size", "16", "--dim", "4", "--channels", "32"]
    recipe_module.main([*options, "--images", "16", "--batch", "8"])
    assert "multiscale: {'psnr': " in capsys.readouterr().out
    tokenizer, about = load_exported(file)
    assert tokenizer.config == CompactConfig("multiscale", 16, 4, 32, patch_nums=(1, 8))
    assert (about["images"], about["hardware"], about["recipe"]["batch"]) == (16, "a test", 8)
    assert json.dumps(about["history"]) == json.dumps([{"from_image": 0, "recipe": about["recipe"]}])
    assert 0 < about["test"]["usage"] <= 1
    with pytest.raises(ValueError, match="holds a run of another network"):
        recipe_module.main([*options, "--channels", "64"])
