"""DINOv2 through transformers, with the position embeddings of torch.hub, which the published statistics were made with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.weights import read_weights
from genkit_eval.extractors.base import MAIN, Extractor, Options
from genkit_eval.extractors.pretrained import build
from genkit_eval.extractors.resize import Preprocess
from genkit_eval.extractors.weights import HubFile, locate, named

SIZE, PATCH = 224, 14
# ImageNet's, in levels.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
#: Resize rules it is used with, and whose protocol each is; the first is the default.
VARIANTS = {
    "torch-bicubic-antialias": "edm2",
    "pil-bicubic": "dgm-eval",
    "clean": "dgm-eval-clean",
    "tf1": "torch-fidelity",
    "none": "no-resize",
}

#: Configuration and weights by the letter of the size.
MODELS: dict[str, tuple[dict[str, Any], HubFile]] = {
    "s": (
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
        HubFile.at(
            "facebook/dinov2-small",
            "ed25f3a31f01632728cabb09d1542f84ab7b0056",
            "model.safetensors",
            "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
        ),
    ),
    "b": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        HubFile.at(
            "facebook/dinov2-base",
            "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
            "model.safetensors",
            "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
        ),
    ),
    "l": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        HubFile.at(
            "facebook/dinov2-large",
            "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
            "model.safetensors",
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        ),
    ),
    "g": (
        {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
        HubFile.at(
            "facebook/dinov2-giant",
            "611a9d42f2335e0f921f1e313ad3c1b7178d206d",
            "model.safetensors",
            "917d3c470db999d32a312f8542149be91c7cbac61ee8fb4b67ae3d82b79ce21f",
        ),
    ),
}


def hub_positions(embedding: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + n n, C) on a grid x grid raster, by torch.hub's rule.

    Bicubic by the factor ``(grid + 0.1) / n``, as torch.hub passes it; sizes (transformers) or antialias (timm) give others.
    """
    token, patches = embedding[:, :1], embedding[:, 1:]
    n = round(patches.shape[1] ** 0.5)
    if n == grid:
        return embedding
    raster = patches.float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / n
    raster = F.interpolate(raster, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([token, raster.permute(0, 2, 3, 1).flatten(1, 2).to(token.dtype)], dim=1)


def fix_positions(net: Any, size: int = SIZE) -> None:
    """Give a ``Dinov2Model`` the position embeddings for images of ``size``, so that transformers need not make them."""
    embeddings = net.embeddings
    with torch.no_grad():
        found = hub_positions(embeddings.position_embeddings, size // embeddings.patch_size)
    embeddings.position_embeddings = nn.Parameter(found, requires_grad=False)


def load_dinov2(size: str, options: Options) -> Extractor:
    """The extractor ``dinov2-vit-<size>-14``, size s, b, l or g: the normed class token."""
    from transformers import Dinov2Config, Dinov2Model

    about, file = MODELS[size]
    name = f"dinov2-vit-{size}-14"
    rule = options.rule(name, VARIANTS)
    path, sha256 = locate(file, options.weights, options.any_weights)
    config = Dinov2Config(image_size=518, patch_size=PATCH, mlp_ratio=4, layerscale_value=1.0, layer_norm_eps=1e-6, **about)
    net = build(Dinov2Model, config, read_weights(path), path).to(options.device)
    fix_positions(net)
    prepare = Preprocess(rule, SIZE, MEAN, STD)
    mark = named(sha256, file)
    return Extractor(
        f"{name}{mark}",
        f"DINOv2{'' if size == 'l' else f'-{size.upper()}'}{mark}",
        sha256,
        rule,
        lambda pixels: net(prepare(pixels)).pooler_output,
        layers={MAIN: config.hidden_size},
        variant=f"{name}-{VARIANTS[rule]}{mark}",
        device=options.device,
        batch=32,
        part="dinov2",
    )
