"""What :func:`genkit.attach` knows of each family of diffusers pipelines: one :class:`Adapter` per family.

A new pipeline is a new name in an entry of ``ADAPTERS``, or a new entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Arguments = Mapping[str, Any]
Order = Literal["uncond cond", "cond uncond", "two calls", "cond"]


def by_scale(pipe: Any, arguments: Arguments) -> bool:
    """Whether the pipeline doubles: its own word for it, where it has one."""
    own = getattr(pipe, "do_classifier_free_guidance", None)
    return bool(arguments["guidance_scale"] > 1 if own is None else own)


def by_true_cfg(*embeds: str) -> Callable[[Any, Arguments], bool]:
    """The rule of pipelines with ``true_cfg_scale``: a scale above 1, and a negative prompt or all of these embeddings."""

    def guided(pipe: Any, arguments: Arguments) -> bool:
        negative = arguments.get("negative_prompt") is not None or all(arguments.get(name) is not None for name in embeds)
        return bool(arguments["true_cfg_scale"] > 1 and negative)

    return guided


def never(pipe: Any, arguments: Arguments) -> bool:
    return False


def unscaled(pipe: Any) -> tuple[float, float]:
    return 1.0, 0.0


def thousandth(pipe: Any) -> tuple[float, float]:
    return 1 / pipe.scheduler.config.num_train_timesteps, 0.0


def reversed_unit(pipe: Any) -> tuple[float, float]:
    return -1 / pipe.scheduler.config.num_train_timesteps, 1.0


def sana_scale(pipe: Any) -> tuple[float, float]:
    return pipe.transformer.config.timestep_scale, 0.0


@dataclass(frozen=True)
class Adapter:
    """How a family of pipelines calls its network.

    Attributes:
        pipelines: class names; a subclass of one is found too.
        order: rows of a guided call: both halves in one call in this order, or two calls, the conditional one first. "cond":
            these pipelines never evaluate an unconditional branch.
        batched: arguments of the network that hold one row per sample, as dotted paths into mappings; lists of tensors count
            as their tensors. The input and the timestep need not be named.
        shared: tensors that all samples share. A tensor that is in neither list is refused.
        denoisers: names of the components to take over; those that are None are left out.
        x, timestep: names of the network's input and of its time.
        axis: the channel axis of input and output. The noisy image is the first of them; others (a mask, a first frame) belong
            to the condition.
        channels: ``channels(config)`` of the network: how many channels the noisy image has.
        sign: -1 where the pipeline negates the output before it goes to the scheduler.
        guided: ``guided(pipe, arguments)``: whether this call of the pipeline evaluates the unconditional branch.
        switch: the arguments of the pipeline that turn its guidance on.
        distilled: ``distilled(pipe)``: whether its network was made to be used without an unconditional branch.
        clock: ``clock(pipe) -> (a, b)``: the network is given ``a t + b`` for the scheduler's timestep t.
        control: the component whose outputs go straight to the network as residuals, a ControlNet.
        lists: the arguments that are lists with one tensor per sample; the input and output then are lists too.
        normed: ``normed(arguments)``: whether the pipeline itself gives the guided prediction the conditional one's norm.
        refused: arguments of the pipeline that change its guidance in another way: whether a value does, and what to use instead.
        eval_only: the network drops labels at random in training mode.
    """

    pipelines: tuple[str, ...]
    order: Order
    batched: tuple[str, ...]
    shared: tuple[str, ...] = ()
    denoisers: tuple[str, ...] = ("transformer",)
    x: str = "hidden_states"
    timestep: str = "timestep"
    axis: int = 1
    channels: Callable[[Any], int] = lambda config: config.get("out_channels") or config.in_channels
    sign: int = 1
    guided: Callable[[Any, Arguments], bool] = by_scale
    switch: str = "guidance_scale=2"
    distilled: Callable[[Any], bool] = lambda pipe: False
    clock: Callable[[Any], tuple[float, float]] = unscaled
    control: str | None = None
    lists: tuple[str, ...] = ()
    normed: Callable[[Arguments], bool] = lambda arguments: False
    refused: tuple[tuple[str, Callable[[Any], bool], str], ...] = ()
    eval_only: bool = False

    @cached_property
    def paths(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """``batched``, with its dotted names taken apart."""
        parts = [(name, *name.split(".")) for name in self.batched]
        return tuple((name, first, tuple(rest)) for name, first, *rest in parts)

    def check_mode(self, name: str, module: Any) -> None:
        """Raise ValueError for the network ``pipe.name`` in a mode in which it changes its conditions."""
        if self.eval_only and module.training:
            raise ValueError(f"pipe.{name} is in training mode, where it drops labels at random: call pipe.{name}.eval()")


RESCALE = ("guidance_rescale", lambda value: (value or 0) > 0, "Rescaled(guidance, phi)")
SKIP = ("skip_guidance_layers", lambda value: value is not None, "a guidance that skips layers (SLG)")
RATIO = ("cfg_trunc_ratio", lambda value: value < 1, "Interval(guidance, 0, ratio, 'fraction')")
TRUNCATION = ("cfg_truncation", lambda value: value is not None and value < 1, "Interval(guidance, low, high)")
CAP = ("cfg_normalization", lambda value: bool(value), "NormMatched(guidance)")

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
ADDED = ("text_embeds", "time_ids", "image_embeds", "resolution", "aspect_ratio")
UNET: dict[str, Any] = {
    "order": "uncond cond",
    "denoisers": ("unet",),
    "x": "sample",
    "batched": (
        "encoder_hidden_states", "encoder_attention_mask", "attention_mask", "class_labels", "timestep_cond", "controlnet_cond",
        *RESIDUALS, *(f"added_cond_kwargs.{name}" for name in ADDED),
    ),
    "shared": ("cross_attention_kwargs.ip_adapter_masks",),
    "distilled": lambda pipe: pipe.unet.config.time_cond_proj_dim is not None,
    "refused": (RESCALE,),
}  # fmt: skip
FLOW_TOKENS: dict[str, Any] = {
    "order": "two calls",
    "axis": -1,
    "clock": thousandth,
    "switch": "negative_prompt='' and true_cfg_scale=2",
}

ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        (
            "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
            "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
        ),
        **UNET,
    ),
    Adapter(
        (
            "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
        ),
        control="controlnet",
        **UNET,
    ),
    Adapter(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        **{**UNET, "order": "cond", "guided": never},
    ),
    Adapter(
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        "uncond cond",
        ("encoder_hidden_states", "pooled_projections", "joint_attention_kwargs.ip_adapter_image_embeds"),
        refused=(SKIP,),
    ),
    Adapter(
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        "uncond cond",
        ("encoder_hidden_states", "encoder_attention_mask", *(f"added_cond_kwargs.{name}" for name in ADDED)),
    ),
    Adapter(("SanaPipeline",), "uncond cond", ("encoder_hidden_states", "encoder_attention_mask"), clock=sana_scale),
    Adapter(("DiTPipeline",), "cond uncond", ("class_labels",), eval_only=True),
    Adapter(
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        batched=("encoder_hidden_states", "pooled_projections", "guidance", "joint_attention_kwargs.ip_adapter_image_embeds"),
        shared=("img_ids", "txt_ids"),
        guided=by_true_cfg("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        distilled=lambda pipe: bool(pipe.transformer.config.guidance_embeds),
        **FLOW_TOKENS,
    ),
    Adapter(
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        batched=("encoder_hidden_states", "encoder_hidden_states_mask", "guidance"),
        guided=by_true_cfg("negative_prompt_embeds"),
        channels=lambda config: config.patch_size**2 * config.out_channels,
        normed=lambda arguments: True,
        **FLOW_TOKENS,
    ),
    Adapter(
        ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
        "two calls",
        ("encoder_hidden_states", "encoder_hidden_states_image"),
        denoisers=("transformer", "transformer_2"),
    ),
    Adapter(
        ("HunyuanVideoPipeline",),
        "two calls",
        ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"),
        guided=by_true_cfg("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        switch="negative_prompt='' and true_cfg_scale=2",
        distilled=lambda pipe: bool(pipe.transformer.config.guidance_embeds),
    ),
    Adapter(
        ("Lumina2Pipeline",),
        "two calls",
        ("encoder_hidden_states", "encoder_attention_mask"),
        sign=-1,
        clock=reversed_unit,
        normed=lambda arguments: bool(arguments["cfg_normalization"]),
        refused=(RATIO,),
    ),
    Adapter(
        ("ZImagePipeline",),
        "cond uncond",
        ("cap_feats",),
        x="x",
        timestep="t",
        sign=-1,
        clock=reversed_unit,
        lists=("x", "cap_feats"),
        refused=(TRUNCATION, CAP),
    ),
)  # fmt: skip


def find(pipe: Any) -> Adapter:
    """The adapter of a pipeline. Raises ValueError that lists the pipelines there are adapters for."""
    table = {name: adapter for adapter in ADAPTERS for name in adapter.pipelines}
    for cls in type(pipe).__mro__:
        if cls.__name__ in table:
            return table[cls.__name__]
    name, hint = type(pipe).__name__, ""
    if "PAG" in name:
        hint = "; it applies a guidance of its own: load the pipeline without PAG and give attach the guidance PAG"
    elif hasattr(pipe, "guider"):
        hint = "; it takes guider objects, which is the place to put a guidance"
    raise ValueError(f"pipe is a {name}, which attach has no adapter for{hint}; it has them for {', '.join(sorted(table))}")


__all__ = ["ADAPTERS", "Adapter", "Arguments", "find"]
