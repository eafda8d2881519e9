"""Tiny diffusers pipelines with random weights, built without a download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

BETAS = {"steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded(build: Any, *args: Any, **options: Any) -> Any:
    """A module in eval mode whose weights do not depend on what was built before, with biases and zero layers filled too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = build(*args, **options).eval()
        for value in module.parameters():  # AdaLN and output layers start at zero and would hide what they are given
            if not value.any():
                value.data.normal_(0, 0.2)
    return module


@lru_cache
def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


@lru_cache
def t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=16)


@lru_cache
def clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


@lru_cache
def t5() -> T5EncoderModel:
    return seeded(T5EncoderModel, T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@lru_cache
def vae(channels: int = 4) -> AutoencoderKL:
    return seeded(
        AutoencoderKL, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=16,
        shift_factor=0.06 if channels == 16 else None, scaling_factor=0.5,
    )  # fmt: skip


@lru_cache
def unet(xl: bool = False) -> UNet2DConditionModel:
    added: dict[str, Any] = {}
    if xl:
        added = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
        }  # fmt: skip
    return seeded(
        UNet2DConditionModel, block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if xl else 16, attention_head_dim=2, **added,
    )  # fmt: skip


def sd15(scheduler: Any = None) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(
        vae(), clip(), clip_tokenizer(), unet(), scheduler or DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def sdxl(scheduler: Any = None) -> StableDiffusionXLPipeline:
    return quiet(StableDiffusionXLPipeline(
        vae(), clip(), clip(projection=True), clip_tokenizer(), clip_tokenizer(), unet(xl=True),
        scheduler or EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"), add_watermarker=False,
    ))  # fmt: skip


@lru_cache
def mmdit() -> SD3Transformer2DModel:
    return seeded(
        SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip


def sd3(scheduler: Any = None) -> StableDiffusion3Pipeline:
    return quiet(StableDiffusion3Pipeline(
        mmdit(), scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16), clip(projection=True), clip_tokenizer(),
        clip(projection=True), clip_tokenizer(), None, None,
    ))  # fmt: skip


def pixart(scheduler: Any = None) -> PixArtAlphaPipeline:
    transformer = seeded(
        PixArtTransformer2DModel, sample_size=8, num_layers=2, patch_size=2, num_attention_heads=2, attention_head_dim=8,
        in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return quiet(PixArtAlphaPipeline(t5_tokenizer(), t5(), vae(), transformer, scheduler or DDIMScheduler(**BETAS)))


def dit(scheduler: Any = None) -> DiTPipeline:
    transformer = seeded(
        DiTTransformer2DModel, sample_size=8, num_layers=2, patch_size=2, num_attention_heads=2, attention_head_dim=8,
        in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    names = {0: "tench, Tinca tinca", 1: "goldfish"}
    return quiet(DiTPipeline(transformer, vae(), scheduler or DDIMScheduler(), id2label=names))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
