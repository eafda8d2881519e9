"""How the conditions of a diffusers network are made; its other facts are in :mod:`genkit.pipelines.attach.adapters`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.pipelines.attach.adapters import find

FILLED = {"prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt", "kwargs"}
Arguments = dict[str, Any]  # of the network, by name: tensors with one row per image, and mappings of them


class Request(NamedTuple):
    """What a call asks for; ``extra`` are further arguments of the pipeline's own ``encode_prompt``."""

    prompt: list[str] | None
    negative_prompt: str | list[str] | None
    labels: list[int]
    per_prompt: int
    height: int
    width: int
    device: torch.device
    extra: Mapping[str, Any]
    channels: int
    factor: int  # pixels per latent, along each axis
    network_dtype: torch.dtype

    def latents(self, cond: Arguments) -> tuple[int, ...]:
        """The shape of the latents, for conditions with one row per image."""
        rows = len(next(value for value in cond.values() if isinstance(value, Tensor)))
        return rows, self.channels, self.height // self.factor, self.width // self.factor

    def dtype(self, cond: Arguments) -> torch.dtype:
        """The dtype in which the diffusers pipeline draws its noise."""
        states = cond.get("encoder_hidden_states")
        return self.network_dtype if states is None else states.dtype


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        encode: ``encode(pipe, request) -> (cond, uncond)``: the network's arguments beside the image and the timestep. The second
            are what the pipeline's own CFG subtracts: those of the negative prompt, or of none.
        by_class: images are asked for by class label, not by prompt.
    """

    encode: Callable[[Any, Request], tuple[Arguments, Arguments]]
    by_class: bool = False


def stable_diffusion(pipe: Any, ask: Request) -> tuple[Arguments, Arguments]:
    embeds, negative = _encoded(pipe, ask)[:2]
    return {"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative}


def stable_diffusion_xl(pipe: Any, ask: Request) -> tuple[Arguments, Arguments]:
    embeds, negative, pooled, negative_pooled = _encoded(pipe, ask)
    second, size = pipe.text_encoder_2, (ask.height, ask.width)
    dim = pooled.shape[-1] if second is None else second.config.projection_dim
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=embeds.dtype, text_encoder_projection_dim=dim)
    ids = ids.to(ask.device).repeat(len(embeds), 1)

    def arguments(states: Tensor, pool: Tensor) -> Arguments:
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pool, "time_ids": ids}}

    return arguments(embeds, pooled), arguments(negative, negative_pooled)


def stable_diffusion_3(pipe: Any, ask: Request) -> tuple[Arguments, Arguments]:
    ask = ask._replace(extra={"prompt_2": None, "prompt_3": None, **ask.extra})
    embeds, negative, pooled, negative_pooled = _encoded(pipe, ask)
    return (
        {"encoder_hidden_states": embeds, "pooled_projections": pooled},
        {"encoder_hidden_states": negative, "pooled_projections": negative_pooled},
    )


def pixart(pipe: Any, ask: Request) -> tuple[Arguments, Arguments]:
    embeds, mask, negative, negative_mask = _encoded(pipe, ask._replace(negative_prompt=ask.negative_prompt or ""))
    added: Arguments = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.use_additional_conditions:
        size, ratio = torch.tensor([[ask.height, ask.width]]), torch.tensor([[ask.height / ask.width]])
        added = {"resolution": size.repeat(len(embeds), 1).to(embeds), "aspect_ratio": ratio.repeat(len(embeds), 1).to(embeds)}

    def arguments(states: Tensor, attend: Tensor) -> Arguments:
        return {"encoder_hidden_states": states, "encoder_attention_mask": attend, "added_cond_kwargs": added}

    return arguments(embeds, mask), arguments(negative, negative_mask)


def dit(pipe: Any, ask: Request) -> tuple[Arguments, Arguments]:
    labels = torch.tensor(ask.labels, device=ask.device).repeat_interleave(ask.per_prompt)
    null = pipe.transformer.config.num_embeds_ada_norm  # the label after the last class
    return {"class_labels": labels}, {"class_labels": torch.full_like(labels, null)}


def _encoded(pipe: Any, ask: Request) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = pipe.encode_prompt(
        prompt=ask.prompt,
        device=ask.device,
        num_images_per_prompt=ask.per_prompt,
        do_classifier_free_guidance=True,
        negative_prompt=ask.negative_prompt,
        **ask.extra,
    )
    return found


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(stable_diffusion),
    "StableDiffusionXLPipeline": Family(stable_diffusion_xl),
    "StableDiffusion3Pipeline": Family(stable_diffusion_3),
    "PixArtAlphaPipeline": Family(pixart),
    "PixArtSigmaPipeline": Family(pixart),
    "DiTPipeline": Family(dit, by_class=True),
}


def find_family(pipe: Any) -> Family:
    """The family of a pipeline. Raises ValueError that lists those there are."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"pipe is a {type(pipe).__name__}; DiffusersPipeline runs {', '.join(FAMILIES)}. For others, see genkit.attach, which "
        "guides a diffusers pipeline in its own loop"
    )


def network_name(pipe: Any) -> str:
    """The name of the component that predicts."""
    return find(pipe).denoisers[0]


def request(
    pipe: Any, prompt: Any, negative: Any, labels: Any, per_prompt: Any, size: tuple[Any, Any], extra: Mapping[str, Any]
) -> Request:
    """The arguments of a call, checked. Raises ValueError that names the one that does not fit."""
    name, family = type(pipe).__name__, find_family(pipe)
    by_prompt = {"prompt": prompt, "negative_prompt": negative, **extra}
    wrong = [key for key, value in by_prompt.items() if value is not None] if family.by_class else []
    if wrong or (labels is not None and not family.by_class):
        raise ValueError(
            f"{name} takes {'class_labels' if family.by_class else 'a prompt'}, not {', '.join(wrong or ['class_labels'])}"
        )
    if all(value is None for value in (prompt, labels, extra.get("prompt_embeds"))):
        raise ValueError(
            f"{name} needs {'class_labels: indices or names' if family.by_class else 'a prompt: a text or a list of texts'}"
        )
    _known(pipe, extra)
    if not (prompt is None or isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
        raise ValueError(f"prompt={prompt!r} must be a text or a list of texts")
    if isinstance(per_prompt, bool) or not isinstance(per_prompt, int) or per_prompt < 1:
        raise ValueError(f"num_images_per_prompt={per_prompt!r} must be an integer from 1 on")
    if prompt is not None:
        prompt = [prompt] if isinstance(prompt, str) else prompt
        negative = [negative] * len(prompt) if isinstance(negative, str) else negative
        if negative is not None and len(negative) != len(prompt):
            raise ValueError(f"negative_prompt has {len(negative)} texts for {len(prompt)} prompts: give one, or one per prompt")
    network = getattr(pipe, network_name(pipe))
    find(pipe).check_mode(network_name(pipe), network)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    height, width = (_pixels(network.config, factor, i, size[i], family.by_class) for i in (0, 1))
    indices = class_indices(pipe, labels) if family.by_class else []
    channels = network.config.in_channels
    return Request(
        prompt, negative, indices, per_prompt, height, width, pipe._execution_device, extra, channels, factor, network.dtype
    )


def _known(pipe: Any, extra: Mapping[str, Any]) -> None:
    if extra:
        known = set(inspect.signature(pipe.encode_prompt).parameters) - FILLED
        unknown = [key for key in extra if key not in known]
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; beside its own, DiffusersPipeline takes {', '.join(sorted(known))} of "
                f"{type(pipe).__name__}.encode_prompt"
            )


def _pixels(config: Any, factor: int, axis: int, value: Any, fixed: bool) -> int:
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[axis]
    step = factor * (config.get("patch_size") or 1)
    if value is None or value == side * factor:
        return int(side * factor)
    if fixed or isinstance(value, bool) or not isinstance(value, int) or value < step or value % step:
        fits = f"{side * factor}, the only size of this model" if fixed else f"a multiple of {step}"
        raise ValueError(f"{('height', 'width')[axis]}={value!r} must be {fits} (in pixels)")
    return value


def class_indices(pipe: Any, labels: Any) -> list[int]:
    """Class labels given as indices or names, one or several. Raises ValueError naming what would work."""
    plain = labels.tolist() if hasattr(labels, "tolist") else labels
    classes = pipe.transformer.config.num_embeds_ada_norm
    found = []
    for label in plain if isinstance(plain, list | tuple | range) else [plain]:
        index = pipe.labels.get(label) if isinstance(label, str) else label
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < classes:
            names = f", or one of the {len(pipe.labels)} names in pipe.labels" if pipe.labels else ""
            raise ValueError(f"class_labels contains {label!r}: use an index from 0 to {classes - 1}{names}")
        found.append(index)
    return found
