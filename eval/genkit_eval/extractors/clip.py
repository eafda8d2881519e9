"""CLIP ViT-L/14-336 through transformers: embeddings of images and of texts, of length one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from genkit.weights import read_weights
from genkit_eval.errors import InputError
from genkit_eval.extractors.base import MAIN, Extractor, Options
from genkit_eval.extractors.pretrained import build
from genkit_eval.extractors.resize import Preprocess
from genkit_eval.extractors.weights import HubFile, locate, named

NAME = "clip-vit-l-14-336"
SIZE, TOKENS = 336, 77
MEAN = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
STD = (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255)
REPOSITORY, REVISION = "openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"
WEIGHTS = HubFile.at(
    REPOSITORY, REVISION, "pytorch_model.bin", "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801"
)
#: Resize rules it is used with, and whose protocol each is; the first is the default.
VARIANTS = {"crop-pil-bicubic": "cmmd", "torch-bicubic-antialias": "torch", "none": "no-resize"}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
WIDTH = 768


def clip_config() -> Any:
    """The published configuration."""
    from transformers import CLIPConfig

    vision = {**VISION, "image_size": SIZE, "patch_size": 14, "projection_dim": WIDTH}
    return CLIPConfig(text_config={**TEXT, "projection_dim": WIDTH}, vision_config=vision, projection_dim=WIDTH)


def embed_images(net: Any, pixels: Tensor) -> Tensor:
    """Projected image embeddings (B, D) of length one, of normalised images."""
    return F.normalize(net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output), dim=1)


def embed_texts(net: Any, tokenize: Callable[[Sequence[str]], dict[str, Tensor]], texts: Sequence[str]) -> Tensor:
    """Projected text embeddings (N, D) of length one."""
    inputs = {key: value.to(net.device) for key, value in tokenize(texts).items()}
    return F.normalize(net.text_projection(net.text_model(**inputs).pooler_output), dim=1)


def tokenizer() -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """CLIP's own: texts are cut at 77 tokens and padded to the longest. InputError when its files cannot be had."""
    from transformers import CLIPTokenizer

    try:
        tokens = CLIPTokenizer.from_pretrained(REPOSITORY, revision=REVISION)
    except OSError as error:
        first = " ".join(str(error).split())[:200]
        raise InputError("--extractor", f"the tokenizer of {REPOSITORY} cannot be fetched ({first})") from None
    return lambda texts: dict(tokens(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))


def load_clip(options: Options) -> Extractor:
    """The extractor ``clip-vit-l-14-336``. The tokenizer is fetched when the first text is embedded."""
    import torch
    from transformers import CLIPModel

    rule = options.rule(NAME, VARIANTS)
    path, sha256 = locate(WEIGHTS, options.weights, options.any_weights)
    net = build(CLIPModel, clip_config(), read_weights(path), path).to(options.device)
    prepare = Preprocess(rule, SIZE, MEAN, STD)

    def texts(found: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return embed_texts(net, tokenizer(), found).float().cpu()

    mark = named(sha256, WEIGHTS)
    return Extractor(
        f"{NAME}{mark}",
        f"CLIP{mark}",
        sha256,
        rule,
        lambda pixels: embed_images(net, prepare(pixels)),
        layers={MAIN: WIDTH},
        variant=f"{NAME}-{VARIANTS[rule]}{mark}",
        device=options.device,
        batch=32,
        texts=texts,
        part="clip",
    )
