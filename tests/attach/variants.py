"""The other pipelines of each family, most of them around the networks of the first: image to image, inpainting, distilled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.attach.tiny import CASES, SIZE, VIDEO, Case, hole, image, lively, masked, qwen_text, scheduler, sd, seeded, text, vae

LATE = {"strength": 0.8, "num_inference_steps": 5}  # 4 steps


def around(base: str, kind: str, **parts: Callable[[], Any]) -> Callable[[], Any]:
    """How to make a pipeline of another class around the components of ``CASES[base]``, and of new ones."""

    @functools.cache
    def make() -> Any:
        return getattr(diffusers, kind).from_pipe(CASES[base].pipe, **{name: part() for name, part in parts.items()})

    return make


class Variant(Case):
    """A case whose pipeline need not be saved and loaded: the one it is made from was."""

    @property
    def pipe(self) -> Any:
        made = seeded(self.make)
        made.set_progress_bar_config(disable=True)
        return made


def sd3_inpaint_net(in_channels: int) -> Any:
    """Inpainting with Stable Diffusion 3 demands 16 channels, or 33: noisy image, mask, masked image."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=in_channels, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=16, pos_embed_max_size=16,
    )  # fmt: skip
    return lively(net).eval()


def sd3_inpaint(in_channels: int) -> Callable[[], Any]:
    return around(
        "sd3",
        "StableDiffusion3InpaintPipeline",
        transformer=lambda: sd3_inpaint_net(in_channels),
        vae=lambda: vae(16, shift_factor=0.0).eval(),
    )


def pixart_net() -> Any:
    """Of the size at which PixArt-alpha is told resolution and aspect ratio."""
    net = diffusers.PixArtTransformer2DModel(
        sample_size=128, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=12, num_attention_heads=2,
        cross_attention_dim=24, caption_channels=12, use_additional_conditions=True, norm_num_groups=1,
    )  # fmt: skip
    return lively(net).eval()


def wan_net(**options: Any) -> Any:
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=16, num_layers=1,
        rope_max_seq_len=32, **options,
    )  # fmt: skip
    return lively(net).eval()


def wan_vae() -> Any:
    """Compresses time by 4, as image to video takes for granted."""
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, scale_factor_temporal=4, scale_factor_spatial=4,
    ).eval()  # fmt: skip


def seeing() -> Any:
    """The image encoder of Wan 2.1."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        )
    ).eval()


def lcm(kind: str) -> Callable[[], Any]:
    @functools.cache
    def make() -> Any:
        return sd(kind, {"time_cond_proj_dim": 8}, scheduler=scheduler(diffusers.LCMScheduler))

    return make


def begin(batch: int, size: int = SIZE) -> dict[str, Any]:
    return {"image": torch.nn.functional.interpolate(image(batch), size), **LATE}


def controlled(batch: int) -> dict[str, Any]:
    return {**begin(batch), "control_image": image(batch).flip(-1)}


def controlled_hole(batch: int) -> dict[str, Any]:
    return {**hole(batch), **LATE, "control_image": image(batch).flip(-1)}


def large_hole(batch: int, size: int) -> dict[str, Any]:
    parts = {k: torch.nn.functional.interpolate(v, size) for k, v in hole(batch).items() if isinstance(v, Tensor)}
    return {**parts, "height": size, "width": size, **LATE}


def words(batch: int) -> dict[str, Any]:
    return text(batch, pooled=10)


def first_frame(batch: int) -> dict[str, Any]:
    return {**text(batch), **VIDEO, "num_frames": 5, "image": torch.nn.functional.interpolate(image(1), 16)}


def video(batch: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(6)
    return {**text(batch), "height": 16, "width": 16, "video": torch.rand(batch, 2, 3, 16, 16, generator=g), **LATE}


TRUE = "true_cfg_scale"
VARIANTS = {
    "sd control img2img": Variant(
        around("sd control", "StableDiffusionControlNetImg2ImgPipeline"), lambda b: {**text(b), **controlled(b)}
    ),
    "sd control inpaint": Variant(
        around("sd control", "StableDiffusionControlNetInpaintPipeline"), lambda b: {**text(b), **controlled_hole(b)}
    ),
    "sdxl control img2img": Variant(
        around("sdxl control", "StableDiffusionXLControlNetImg2ImgPipeline"), lambda b: {**words(b), **controlled(b)}
    ),
    "sdxl control inpaint": Variant(
        around("sdxl control", "StableDiffusionXLControlNetInpaintPipeline"), lambda b: {**words(b), **controlled_hole(b)}
    ),
    "sd3 img2img": Variant(around("sd3", "StableDiffusion3Img2ImgPipeline"), lambda b: {**words(b), **begin(b)}),
    "sd3 inpaint": Variant(sd3_inpaint(16), lambda b: {**words(b), **large_hole(b, SIZE)}),
    "sd3 inpaint of 33 channels": Variant(sd3_inpaint(33), lambda b: {**words(b), **large_hole(b, SIZE)}),
    "pixart alpha": Variant(
        around("pixart", "PixArtAlphaPipeline", transformer=pixart_net),
        lambda b: {**masked(b), "height": SIZE, "width": SIZE, "use_resolution_binning": False},
    ),
    "flux img2img": Variant(
        around("flux", "FluxImg2ImgPipeline"), lambda b: {**words(b), **begin(b, 16), "height": 16, "width": 16}, TRUE
    ),
    "flux inpaint": Variant(around("flux", "FluxInpaintPipeline"), lambda b: {**words(b), **large_hole(b, 16)}, TRUE),
    "qwen img2img": Variant(
        around("qwen", "QwenImageImg2ImgPipeline"), lambda b: {**qwen_text(b), **begin(b, 16), "height": 16, "width": 16}, TRUE
    ),
    "qwen inpaint": Variant(around("qwen", "QwenImageInpaintPipeline"), lambda b: {**qwen_text(b), **large_hole(b, 16)}, TRUE),
    "wan 2.1 image": Variant(
        around(
            "wan",
            "WanImageToVideoPipeline",
            transformer=lambda: wan_net(in_channels=12, image_dim=8),
            vae=wan_vae,
            image_encoder=seeing,
            image_processor=lambda: CLIPImageProcessor(size=16, crop_size=16),
        ),
        first_frame,
    ),
    "wan 2.2 image": Variant(
        around(
            "wan 2.2",
            "WanImageToVideoPipeline",
            vae=wan_vae,
            transformer=lambda: wan_net(in_channels=12),
            transformer_2=lambda: wan_net(in_channels=12),
        ),
        first_frame,
    ),
    "wan 2.2 5B image": Variant(
        around("wan", "WanImageToVideoPipeline", transformer=lambda: wan_net(in_channels=4), expand_timesteps=lambda: True),
        first_frame,
    ),
    "wan video": Variant(around("wan", "WanVideoToVideoPipeline"), video),
}
ALL = {**CASES, **VARIANTS}

# Without an unconditional branch.
DISTILLED = {
    "lcm": Variant(
        lcm("LatentConsistencyModelPipeline"),
        lambda b: {"prompt_embeds": text(b)["prompt_embeds"], "height": SIZE, "width": SIZE},
    ),
    "lcm img2img": Variant(
        lcm("LatentConsistencyModelImg2ImgPipeline"), lambda b: {"prompt_embeds": text(b)["prompt_embeds"], **begin(b)}
    ),
}
