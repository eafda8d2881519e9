"""Tiny pipelines of each family with random weights, saved and loaded by diffusers' own means, and the embeddings they take."""

from __future__ import annotations

import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

SIZE = 8  # latent
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="diffusers")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae(latent: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=latent, sample_size=SIZE, **options)


def unet(**options: Any) -> nn.Module:
    small: dict[str, Any] = {
        "sample_size": SIZE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 12,
    }
    return diffusers.UNet2DConditionModel(**{**small, **options})


XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 10,
    "transformer_layers_per_block": 1,
}


def lively(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Random weights everywhere: several networks begin with zeros at the end, and would answer any input with 0."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return module


def scheduler(kind: type = DDIMScheduler, **options: Any) -> Any:
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    if kind is DDIMScheduler:
        common["set_alpha_to_one"] = False
    if kind is diffusers.PNDMScheduler:
        common["skip_prk_steps"] = True
    known = inspect.signature(kind.__init__).parameters
    return kind(**{**{name: value for name, value in common.items() if name in known}, **options})


def sd(kind: str = "StableDiffusionPipeline", net: dict[str, Any] | None = None, **options: Any) -> Any:
    parts: dict[str, Any] = {"vae": vae(), "unet": lively(unet(**(net or {}))), "scheduler": scheduler()}
    parts |= {
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return getattr(diffusers, kind)(**{**parts, **options})


def sdxl(kind: str = "StableDiffusionXLPipeline", net: dict[str, Any] | None = None, **options: Any) -> Any:
    parts: dict[str, Any] = {"vae": vae(), "unet": lively(unet(**{**XL_UNET, **(net or {})})), "scheduler": scheduler()}
    parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return getattr(diffusers, kind)(**{**parts, **options}, add_watermarker=False)


def sd3() -> Any:
    net = diffusers.SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    parts = dict.fromkeys(f"{a}{b}" for a in ("text_encoder", "tokenizer") for b in ("", "_2", "_3"))
    return diffusers.StableDiffusion3Pipeline(
        transformer=lively(net), vae=vae(shift_factor=0.0), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )


def pixart() -> Any:
    net = diffusers.PixArtTransformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        cross_attention_dim=16, caption_channels=12, use_additional_conditions=False, norm_num_groups=1,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=lively(net),
        vae=vae(),
        scheduler=scheduler(diffusers.DPMSolverMultistepScheduler),
        text_encoder=None,
        tokenizer=None,
    )


def sana() -> Any:
    net = diffusers.SanaTransformer2DModel(
        sample_size=SIZE, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, timestep_scale=0.5,
    )  # fmt: skip
    dc = diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_types=("ResBlock", "ResBlock"), decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )  # fmt: skip
    flow = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(transformer=lively(net), vae=dc, scheduler=flow, text_encoder=None, tokenizer=None)


def dit() -> Any:
    net = diffusers.DiTTransformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer=lively(net), vae=vae(), scheduler=scheduler())


def flux(guidance_embeds: bool = False) -> Any:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.FluxPipeline(
        transformer=lively(net), vae=vae(shift_factor=0.0), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )


def qwen() -> Any:
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImagePipeline(
        transformer=lively(net), vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None
    )


def wan(two: bool = False) -> Any:
    nets = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=16,
            num_layers=1, rope_max_seq_len=32,
        )
        for _ in range(2)
    ]  # fmt: skip
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, scale_factor_temporal=1, scale_factor_spatial=2,
    )  # fmt: skip
    flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(
        transformer=lively(nets[0]), transformer_2=lively(nets[1], 0.5) if two else None, boundary_ratio=0.7 if two else None,
        vae=decoder, scheduler=flow, text_encoder=None, tokenizer=None,
    )  # fmt: skip


def wan22() -> Any:
    return wan(two=True)


def hunyuan() -> Any:
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, guidance_embeds=True, text_embed_dim=12, pooled_projection_dim=10,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.HunyuanVideoPipeline(
        transformer=lively(net), vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **parts
    )


def lumina2() -> Any:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(32, 32, 32), cap_feat_dim=12,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=lively(net),
        vae=vae(shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def z_image() -> Any:
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=lively(net),
        vae=vae(shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def control_net(**options: Any) -> nn.Module:
    return lively(
        diffusers.ControlNetModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4,), **options,
        )
    )  # fmt: skip


def sd_control() -> Any:
    return sd("StableDiffusionControlNetPipeline", controlnet=control_net())


def sdxl_control() -> Any:
    return sdxl("StableDiffusionXLControlNetPipeline", controlnet=control_net(**XL_UNET))


def sd2() -> Any:
    return sd(scheduler=scheduler(prediction_type="v_prediction"))


def sd_img2img() -> Any:
    return sd("StableDiffusionImg2ImgPipeline")


def sd_inpaint() -> Any:
    return sd("StableDiffusionInpaintPipeline", {"in_channels": 9})


def sdxl_img2img() -> Any:
    return sdxl("StableDiffusionXLImg2ImgPipeline")


def sdxl_inpaint() -> Any:
    return sdxl("StableDiffusionXLInpaintPipeline", {"in_channels": 9})


def seeded(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make(*args)`` builds, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args)


@functools.cache
def loaded(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make(*args)`` built, saved and loaded again by diffusers."""
    made = seeded(make, *args)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        absent = {name: None for name, part in made.components.items() if part is None}
        if "requires_safety_checker" in made.config:
            absent["requires_safety_checker"] = False
        pipe = type(made).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(batch: int, tokens: int = 5, dim: int = 12, pooled: int = 0) -> dict[str, Tensor]:
    """Embeddings of prompts and of negative prompts."""
    out = {"prompt_embeds": randn(batch, tokens, dim), "negative_prompt_embeds": randn(batch, tokens, dim, seed=1)}
    if pooled:
        out |= {
            "pooled_prompt_embeds": randn(batch, pooled, seed=2),
            "negative_pooled_prompt_embeds": randn(batch, pooled, seed=3),
        }
    return out


def masked(batch: int, **options: Any) -> dict[str, Tensor]:
    out = text(batch, **options)
    mask = torch.ones(batch, out["prompt_embeds"].shape[1], dtype=torch.long)
    return {
        **out,
        "negative_prompt": None,
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask - (torch.arange(mask.shape[1]) > 2).long(),
    }


VIDEO = {"height": 16, "width": 16, "num_frames": 1}


def image(batch: int) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def hole(batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    return {"image": image(batch), "mask_image": mask, "height": SIZE, "width": SIZE}


def qwen_text(batch: int) -> dict[str, Any]:
    """A negative prompt shorter than the prompt."""
    out = text(batch)
    out["negative_prompt_embeds"] = out["negative_prompt_embeds"][:, :3]
    masks = {f"{name}_mask": torch.ones(value.shape[:2], dtype=torch.long) for name, value in out.items()}
    masks["prompt_embeds_mask"][-1, -1] = 0
    return {**out, **masks}


def hunyuan_text(batch: int) -> dict[str, Any]:
    out = {**masked(batch), **text(batch, pooled=10)}
    del out["negative_prompt"]
    return out


def lists(batch: int) -> dict[str, Any]:
    """Embeddings of unequal length, a tensor per prompt."""
    return {
        "prompt_embeds": [randn(3 + i, 12, seed=i) for i in range(batch)],
        "negative_prompt_embeds": [randn(2 + i, 12, seed=10 + i) for i in range(batch)],
    }


class Rows:
    """Counts the rows that reach a network's own forward, as a hook of offloading would sit around it."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.each = modules, list[int]()

    @property
    def total(self) -> int:
        return sum(self.each)

    def __enter__(self) -> Rows:
        for module in self.modules:
            module.forward = self._counting(module, module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward

    def _counting(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(forward).parameters))

        @functools.wraps(forward)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.each.append(len(args[0] if args else kwargs[first]))
            return forward(*args, **kwargs)

        return counting


def denoisers(pipe: Any) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [pipe.components[n] for n in ("unet", "transformer", "transformer_2") if pipe.components.get(n) is not None]


def distance(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``."""
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Case:
    """One family: how to make the pipeline, what to call it with, and where its guidance scale is."""

    make: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    scale: str = "guidance_scale"
    shift: float = 0.0  # the pipeline's scale is w less this

    @property
    def pipe(self) -> Any:
        return loaded(self.make)

    def __call__(self, scale: float, batch: int = 2, pipe: Any = None, **options: Any) -> Tensor:
        """Latents of a run of 4 steps at a guidance scale w, always from the same noise."""
        pipe = self.pipe if pipe is None else pipe
        arguments = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "output_type": "latent"}
        arguments |= {**self.inputs(batch), self.scale: scale - self.shift, **options}
        if "class_labels" in arguments:
            arguments["output_type"] = "pt"
        return next(iter(pipe(**arguments).values()))


CASES = {
    "sd": Case(sd, lambda b: {**text(b), "height": SIZE, "width": SIZE}),
    "sdxl": Case(sdxl, lambda b: {**text(b, pooled=10), "height": SIZE, "width": SIZE}),
    "sd3": Case(sd3, lambda b: {**text(b, pooled=10), "height": SIZE, "width": SIZE}),
    "pixart": Case(pixart, lambda b: {**masked(b), "height": SIZE, "width": SIZE, "use_resolution_binning": False}),
    "sana": Case(sana, lambda b: {**masked(b), "height": 32, "width": 32, "use_resolution_binning": False}),
    "dit": Case(dit, lambda b: {"class_labels": [1, 2, 3, 4][:b]}),
    "sd2": Case(sd2, lambda b: {**text(b), "height": SIZE, "width": SIZE}),
    "sd control": Case(sd_control, lambda b: {**text(b), "image": image(b)}),
    "sdxl control": Case(sdxl_control, lambda b: {**text(b, pooled=10), "image": image(b)}),
    "sd img2img": Case(sd_img2img, lambda b: {**text(b), "image": image(b), "strength": 0.8, "num_inference_steps": 5}),
    "sdxl img2img": Case(
        sdxl_img2img, lambda b: {**text(b, pooled=10), "image": image(b), "strength": 0.8, "num_inference_steps": 5}
    ),
    "sd inpaint": Case(sd_inpaint, lambda b: {**text(b), **hole(b)}),
    "sdxl inpaint": Case(sdxl_inpaint, lambda b: {**text(b, pooled=10), **hole(b), "strength": 1.0}),
    "qwen": Case(qwen, lambda b: {**qwen_text(b), "height": 16, "width": 16}, "true_cfg_scale"),
    "wan": Case(wan, lambda b: {**text(b), **VIDEO}),
    "wan 2.2": Case(wan22, lambda b: {**text(b), **VIDEO}),
    "hunyuan": Case(hunyuan, lambda b: {**hunyuan_text(b), **VIDEO, "height": 32, "width": 32}, "true_cfg_scale"),
    "lumina 2": Case(lumina2, lambda b: {**masked(b, dim=12), "height": 16, "width": 16, "cfg_normalization": False}),
    "z-image": Case(z_image, lambda b: {**lists(b), "height": 16, "width": 16}, shift=1.0),
    "flux": Case(flux, lambda b: {**text(b, pooled=10), "height": 16, "width": 16}, "true_cfg_scale"),
}
