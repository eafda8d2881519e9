"""Latents of a diffusers model as images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


def decode(pipe: Any, latents: Tensor, output_type: str) -> Any:
    """Images in [0, 1] as ``output_type`` ("pil", "np", "pt"), or the latents themselves ("latent").

    The pipeline's safety checker and watermark act as they do in the pipeline.

    Raises:
        ValueError: the latents are not finite.
    """
    if output_type == "latent":
        return latents
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("the latents hold NaN or infinity: the model or the guidance diverged; try a smaller guidance scale")
    vae = pipe.vae
    half = vae.dtype == torch.float16 and vae.config.get("force_upcast") and hasattr(pipe, "upcast_vae")
    if half:  # activations of the XL decoder leave the range of float16
        vae.to(torch.float32)
    try:
        image = vae.decode(_unscaled(vae.config, latents).to(vae.dtype), return_dict=False)[0]
    finally:
        if half:
            vae.to(torch.float16)
    flags = None
    if hasattr(pipe, "run_safety_checker"):
        image, flags = pipe.run_safety_checker(image, image.device, image.dtype)
    if getattr(pipe, "watermark", None) is not None:
        image = pipe.watermark.apply_watermark(image)
    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor()
    shown = [not flag for flag in flags] if flags is not None else [True] * len(image)
    return processor.postprocess(image, output_type=output_type, do_denormalize=shown)


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value).to(latents).reshape(1, -1, 1, 1) for value in (mean, std))
        shifted: Tensor = latents * std / config.scaling_factor + mean
        return shifted
    plain: Tensor = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return plain
