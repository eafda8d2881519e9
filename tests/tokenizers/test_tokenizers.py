"""Image tokenizers against the official ones: numbers with small weights, key layouts at full size."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from genkit.tokenizers.llamagen_vq import LLAMAGEN_TOKENIZERS, LlamaGenTokenizer, LlamaGenTokenizerConfig
from genkit.tokenizers.open_magvit2 import OPEN_MAGVIT2_TOKENIZERS, OpenMAGVIT2Tokenizer, OpenMAGVIT2TokenizerConfig
from genkit.tokenizers.var_vqvae import VAR_TOKENIZERS, VARTokenizer, VARTokenizerConfig
from tests.tokenizers.golden import close, layout, listed, read, under

SMALL = {"channels": 32, "multipliers": (1, 1, 2), "blocks": 1}


@pytest.mark.parametrize(
    ("project", "file", "make"),
    [
        ("var", "vae_ch160v4096z32.pth", lambda: VARTokenizer(VAR_TOKENIZERS["256"])),
        ("var", "vae_ch160v4096z32.pth", lambda: VARTokenizer(VAR_TOKENIZERS["512"])),
        ("llamagen", "vq_ds16_c2i.pt", lambda: LlamaGenTokenizer(LLAMAGEN_TOKENIZERS["VQ-16"])),
        ("llamagen", "vq_ds16_t2i.pt", LlamaGenTokenizer),
        ("llamagen", "vq_ds8_c2i.pt", lambda: LlamaGenTokenizer(LLAMAGEN_TOKENIZERS["VQ-8"])),
        ("magvit", "imagenet_256_L.ckpt", lambda: OpenMAGVIT2Tokenizer(OPEN_MAGVIT2_TOKENIZERS["imagenet_256_L"])),
    ],
)
def test_keys_and_shapes_are_the_official_ones(project, file, make):
    with torch.device("meta"):
        tokenizer = make()
    assert {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()} == layout(project, file)


@torch.no_grad()
def test_var(tmp_path):
    data, _ = read("var_vqvae")
    torch.save({"trainer": {"vae_local": under(data, "state_dict.")}, "epoch": 3}, tmp_path / "ckpt.pth")
    tokenizer = VARTokenizer(VARTokenizerConfig(128, 8, **SMALL, patch_nums=(1, 2, 3, 5, 8)))
    assert tokenizer.load_state(tmp_path / "ckpt.pth") is tokenizer
    f = tokenizer.features(data["image"])
    close(f, data["enc.f"])
    indices = tokenizer.encode(data["image"])
    assert torch.equal(indices, torch.cat(listed(data, "idx"), 1))
    f_hats = tokenizer.quantize.f_hats(indices)
    for found, wanted in zip(f_hats, listed(data, "f_hat"), strict=True):
        close(found, wanted)
    close(f_hats[-1], data["embed_to_fhat_last"])
    close(tokenizer.quantize.next_inputs(indices), data["var_input"])
    close(tokenizer.decode(indices[:, :1]), data["decoded.0"])  # after the first scale
    close(tokenizer.decode(indices), data["decoded.4"])
    close(tokenizer.decode(torch.cat(listed(data, "rand_idx"), 1)), data["rand_decoded"])


def test_llamagen(tmp_path):
    data, _ = read("llamagen_vq")
    torch.save({"model": under(data, "state_dict."), "steps": 7}, tmp_path / "vq.pt")
    tokenizer = LlamaGenTokenizer(LlamaGenTokenizerConfig(96, 8, **SMALL, z_channels=16)).load_state(tmp_path / "vq.pt")
    with torch.no_grad():
        h = tokenizer.features(data["image"])
        close(h, data["h"])
        z_q, indices, _ = tokenizer.quantize.encode(h)
        close(z_q, data["quant"])
        close(tokenizer.decode_features(z_q), data["decoded"])
        assert torch.equal(indices.flatten(), data["indices"])
        assert torch.equal(tokenizer.encode(data["image"]), indices)
        close(tokenizer.quantize.codes(data["code"]).view(2, 5, 5, 8).movedim(-1, 1), data["code_entry"])
        image = tokenizer.decode(data["code"])
        close(image, data["code_image"])
        assert torch.equal(tokenizer.decode(data["code"].view(2, 5, 5)), image)
    z = data["h"].requires_grad_()
    losses = tokenizer.quantize.train().encode(z).losses
    close(losses["codebook"], data["train.vq_loss"])
    close(losses["commit"], data["train.commit_loss"])
    close(torch.autograd.grad(losses["codebook"] + losses["commit"], z)[0], data["train.grad_z"])
    with pytest.raises(ValueError, match="indices has 24 tokens a row, not a square"):
        tokenizer.decode(data["code"][:, :24])


@torch.no_grad()
def test_open_magvit2(tmp_path):
    data, _ = read("open_magvit2_tokenizer")
    weights = {k: v for k, v in data.items() if k.startswith(("encoder.", "decoder."))}
    config = OpenMAGVIT2TokenizerConfig(8, (3, 5), **SMALL)
    other = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": weights | other, "epoch": 1}, tmp_path / "tokenizer.ckpt")
    tokenizer = OpenMAGVIT2Tokenizer(config).load_state(tmp_path / "tokenizer.ckpt")
    close(tokenizer.features(data["image"]), data["h"])
    z_q, indices, _ = tokenizer.quantize.encode(data["h"])
    close(z_q, data["quantized"])
    assert torch.equal(tokenizer.encode(data["image"]).flatten(), data["indices"])
    close(tokenizer.decode(indices), data["reconstruction"])
    # Inside the file of an autoregressive model.
    nested = {f"first_stage_model.{k}": v for k, v in weights.items()} | {"transformer.head.weight": torch.zeros(2)}
    save_file(nested, tmp_path / "ar.safetensors")
    again = OpenMAGVIT2Tokenizer(config).load_state(tmp_path / "ar.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tokenizer.state_dict().items())


def test_a_file_of_another_model_is_refused_by_name(tmp_path):
    tokenizer = LlamaGenTokenizer(LlamaGenTokenizerConfig(16, 4, 32, (1,), 1, 8))
    weights = tokenizer.state_dict()
    weights["quant_conv.bias"] = torch.zeros(5)
    weights["more"] = torch.zeros(1)
    del weights["post_quant_conv.bias"]
    torch.save(weights, tmp_path / "vq.pt")
    said = (
        r"path='.*vq\.pt': 3 weights do not fit this LlamaGenTokenizer, first "
        r"post_quant_conv.bias \(missing\), quant_conv.bias \(\(5,\) for \(4,\)\), more \(unknown\)"
    )
    with pytest.raises(ValueError, match=said):
        tokenizer.load_state(tmp_path / "vq.pt")


@pytest.mark.parametrize("make", [LlamaGenTokenizerConfig, VARTokenizerConfig])
def test_widths_that_the_norms_cannot_group(make):
    tokenizer = {LlamaGenTokenizerConfig: LlamaGenTokenizer, VARTokenizerConfig: VARTokenizer}[make]
    with pytest.raises(ValueError, match="channels=48"):
        tokenizer(make(channels=48))
