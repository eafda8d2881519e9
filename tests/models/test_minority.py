"""The classifier of minority levels: what it computes, its file, and its place in the built-in pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import genkit
from genkit.guidance.minority import MinorityGuidance
from genkit.models.classifier import Classifier, ClassifierConfig
from genkit.models.minority import FORMAT, MinorityClassifier, MinorityConfig, feature_distance, load_minority, save_minority
from genkit.noise import VE
from genkit.pipelines import loading

TINY = MinorityConfig(levels=4, channels=(16, 16), embedding=16)


@pytest.fixture
def net() -> MinorityClassifier:
    """Random weights, none of them at zero."""
    made = MinorityClassifier(TINY)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return made.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_probabilities_of_the_levels_sum_to_1(net: MinorityClassifier, images: torch.Tensor) -> None:
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    each = torch.stack([net(images, sigma, torch.full((3,), level)) for level in range(4)])
    assert each.shape == (4, 3)
    torch.testing.assert_close(each.exp().sum(0), torch.ones(3))
    torch.testing.assert_close(each.T, net.logits(images, sigma).log_softmax(1))
    assert (net.levels, net.path) == (4, VE)


def test_rows_do_not_touch_and_the_dtype_is_that_of_x(net: MinorityClassifier, images: torch.Tensor) -> None:
    sigma, level = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), torch.tensor([0, 3, 1])
    whole = net(images, sigma, level)
    for i in range(3):
        part = slice(i, i + 1)
        torch.testing.assert_close(net(images[part], sigma[part], level[part]), whole[part])
    assert net(images.double(), sigma, level).dtype == torch.float64
    assert not torch.allclose(whole, net(images, 2 * sigma, level))


def test_the_shipped_size_is_below_two_megabytes() -> None:
    assert 2 * sum(v.numel() for v in MinorityClassifier().state_dict().values()) < 2e6


@pytest.mark.parametrize("bad", [{"levels": 1}, {"channels": ()}, {"channels": (16, 20)}], ids=str)
def test_bad_shapes_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        MinorityConfig(**bad)  # type: ignore[arg-type]


def test_feature_distance_clips_and_compares_features(images: torch.Tensor) -> None:
    extractor = Classifier(ClassifierConfig(channels=(4, 8, 8))).eval()
    other = images.flip(0)
    expected = (extractor.embed(images) - extractor.embed(other)).square().sum(1).sqrt()
    distance = feature_distance(extractor)
    torch.testing.assert_close(distance(images, other), expected)
    assert torch.equal(distance(3 * images, 3 * images.clamp(-1 / 3, 1 / 3)), torch.zeros(3))


# ---- the file ----


def test_a_file_reads_back(net: MinorityClassifier, images: torch.Tensor, tmp_path: Path) -> None:
    save_minority(tmp_path / "m.safetensors", net, {"about": "a test"})
    again = load_minority(tmp_path / "m.safetensors")
    assert again.config == TINY
    assert again.metadata["about"] == "a test"
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    sigma, level = torch.ones(3), torch.tensor([0, 3, 1])
    torch.testing.assert_close(again(images, sigma, level), net(images, sigma, level), rtol=0.02, atol=0.02)


def test_damaged_and_foreign_files_are_refused(net: MinorityClassifier, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_minority(path, net, {})
    weights = load_file(path)
    config = {"format": FORMAT, "config": '{"levels": 4, "channels": [16, 16], "embedding": 16}'}
    save_file(weights, path, {**config, "format": "other"})
    with pytest.raises(ValueError, match=r"m\.safetensors' has format='other'"):
        load_minority(path)
    save_file({k: v for k, v in weights.items() if k != "head.bias"}, path, config)
    with pytest.raises(ValueError, match=r"does not fit (.|\n)*head\.bias"):
        load_minority(path)
    save_file({**weights, "head.bias": torch.full((4,), float("nan"))}, path, config)
    with pytest.raises(ValueError, match=r"NaN or infinite values in \['head\.bias'\]"):
        load_minority(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_minority(path)


# ---- in the pipeline ----


def test_the_built_in_pipeline_has_it_once_there_is_a_file(
    net: MinorityClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "minority.safetensors"
    monkeypatch.setitem(loading.BUILTIN, "builtin/cifar10", {"main": "cifar10/diffusion.safetensors", "minority": str(path)})
    without = genkit.load("builtin/cifar10")
    assert set(without.models) == {"main"}
    with pytest.raises(ValueError, match="'minority'; this run has main"):
        without(classes=[3], steps=2, guidance=MinorityGuidance(3.0))

    save_minority(path, net, {"about": json.dumps({})})
    pipe = genkit.load("builtin/cifar10")
    assert isinstance(pipe.models["minority"], MinorityClassifier)
    assert pipe.fingerprint != without.fingerprint
    plain, rare = (pipe(classes=[3], steps=2, sampler="euler", guidance=made) for made in (None, MinorityGuidance(300.0)))
    assert plain.nfe == rare.nfe
    assert not rare.latents.requires_grad
    assert not torch.equal(plain.latents, rare.latents)
