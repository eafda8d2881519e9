"""DINOv2 and CLIP through transformers, with tiny random networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval.errors import InputError
from genkit_eval.extractors import clip, dinov2, load_extractor
from genkit_eval.extractors.pretrained import build
from genkit_eval.extractors.weights import sha256_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parents[1] / "golden" / "eval" / "extractors"
TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def noise(n: int, *shape: int) -> Tensor:
    return torch.randint(256, (n, 3, *shape), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def randomised(net: Any) -> Any:
    """Every weight away from its starting value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return net.eval()


def test_position_embeddings_are_torch_hubs() -> None:
    golden = np.load(GOLDEN / "dinov2_pos_embed.npz")
    embedding = torch.from_numpy(golden["pos_embed"])
    found = dinov2.hub_positions(embedding, 16)
    assert found[:, :1].equal(embedding[:, :1])
    torch.testing.assert_close(found[:, 1:], torch.from_numpy(golden["hub"]), rtol=0, atol=1e-6)
    assert float((found[:, 1:] - torch.from_numpy(golden["hf"])).abs().max()) > 0.01
    assert dinov2.hub_positions(embedding, 37) is embedding


@pytest.fixture
def tiny_dino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A network of one eighteenth of the width, in the names that published files have, in place of the small one."""
    config = transformers.Dinov2Config(image_size=518, patch_size=14, **TINY)
    net = randomised(transformers.Dinov2Model(config))
    with torch.no_grad():
        net.embeddings.position_embeddings.mul_(10)
    net.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert "encoder.layer.0.attention.attention.query.weight" in load_file(path)
    monkeypatch.setitem(dinov2.MODELS, "s", (TINY, dinov2.HubFile.at("a/b", "c" * 40, "model.safetensors", sha256_of(path))))
    return net, path


def test_dinov2(tiny_dino: tuple[Any, Path]) -> None:
    net, path = tiny_dino
    found = load_extractor("dinov2-vit-s-14", weights=path)
    assert (found.name, found.label, found.variant) == ("dinov2-vit-s-14", "DINOv2-S", "dinov2-vit-s-14-edm2")
    assert found.layers == {"features": 12}
    pixels = noise(2, 40, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = F.interpolate(pixels.float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    got = found(pixels)["features"]

    def expected(positions: Tensor) -> Tensor:
        """The class token after the last norm, with these positions."""
        patches = net.embeddings.patch_embeddings(x)
        hidden = torch.cat([net.embeddings.cls_token.expand(2, -1, -1), patches], dim=1) + positions
        for layer in net.encoder.layer:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return net.layernorm(hidden)[:, 0]

    with torch.no_grad():
        near = expected(dinov2.hub_positions(net.embeddings.position_embeddings, 16))
        other = net(x).pooler_output  # with transformers' own rule for positions
    assert float((got - near).abs().max()) < 1e-5 < 1e-4 < float((got - other).abs().max())


def test_dinov2_resize_rules(tiny_dino: tuple[Any, Path]) -> None:
    _, path = tiny_dino
    found = {rule: load_extractor("dinov2-vit-s-14", weights=path, resize=rule) for rule in dinov2.VARIANTS if rule != "none"}
    assert len({extractor.variant for extractor in found.values()}) == len(found)
    features = [extractor(noise(1, 60, 60))["features"] for extractor in found.values()]
    assert not any(a.equal(b) for i, a in enumerate(features) for b in features[:i])


def test_weights_of_another_network(tiny_dino: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = tiny_dino
    state = load_file(path)
    for change, message in (
        ({"layernorm.weight": None}, "lacks layernorm.weight"),
        ({"layernorm.weight": torch.ones(5)}, "has another shape of layernorm.weight"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(InputError, match=f"--weights: .*changed.safetensors {message}"):
            load_extractor("dinov2-vit-s-14", weights=tmp_path / "changed.safetensors", any_weights=True)
    other = {key: value + 1 for key, value in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    found = load_extractor("dinov2-vit-s-14", weights=tmp_path / "other.safetensors", any_weights=True)
    assert found.name == f"dinov2-vit-s-14@{found.sha256[:8]}"
    assert found.label == f"DINOv2-S@{found.sha256[:8]}"


def tiny_clip_config() -> Any:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "projection_dim": 8}
    vision = {**tower, "image_size": 28, "patch_size": 14, "projection_dim": 8}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)


def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
    """Letters to numbers: start, the text, end, padding."""
    longest = max(map(len, texts))
    rows = [[48, *(ord(letter) % 40 for letter in text), *[49] * (longest - len(text) + 1)] for text in texts]
    return {"input_ids": torch.tensor(rows)}


def test_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomised(transformers.CLIPModel(tiny_clip_config()))
    # Published as a pickle, with buffers that newer versions do not store.
    state = {**net.state_dict(), "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(clip, "clip_config", tiny_clip_config)
    monkeypatch.setattr(clip, "SIZE", 28)
    monkeypatch.setattr(clip, "tokenizer", lambda: tokenize)
    found = load_extractor("clip-vit-l-14-336", weights=tmp_path / "pytorch_model.bin", any_weights=True)
    assert found.variant.startswith("clip-vit-l-14-336-cmmd@")
    pixels, words = noise(3, 40, 28), ["a cat", "two dogs on a boat"]
    got, read = found(pixels)["features"], found.texts(words) if found.texts else torch.empty(0)
    assert got.shape == (3, 8)
    assert read.shape == (2, 8)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))
    crop = pixels[:, :, 6:34].float() / 255  # the middle square, of the network's size already
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        out = net(pixel_values=(crop - mean.view(3, 1, 1)) / std.view(3, 1, 1), **tokenize(words))
    torch.testing.assert_close(net.logit_scale.exp() * got @ read.T, out.logits_per_image, rtol=1e-4, atol=1e-4)


def test_published_configurations() -> None:
    """Number of weights of the published networks, without making them."""
    with torch.device("meta"):
        sizes = {
            size: transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14, **about))
            for size, (about, _) in dinov2.MODELS.items()
        }
        net = transformers.CLIPModel(clip.clip_config())
    # Bytes of the published safetensors files, less their headers.
    published = {"s": 88_249_960, "b": 346_345_912, "l": 1_217_522_888, "g": 4_546_005_432}
    for size, found in sizes.items():
        assert 0 < published[size] - 4 * sum(weight.numel() for weight in found.parameters()) < 120_000
    assert 0 < 1_711_974_081 - 4 * sum(weight.numel() for weight in net.parameters()) < 200_000


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    net = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **TINY))
    with pytest.raises(InputError):
        build(transformers.Dinov2Model, net.config, {}, Path("x"))
    assert capfd.readouterr() == ("", "")
