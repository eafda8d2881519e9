"""A diffusers pipeline of classes, such as DiT, as a pipeline that genkit-eval can run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from genkit_eval.extractors.custom import state_sha256
from genkit_eval.extractors.quantise import UINT8_RULES


@dataclass
class DiffusersClasses:
    """Class labels in, images out, by genkit's own loop around the model.

    Args:
        pipe: a ``genkit.DiffusersPipeline`` by class.
        name: recorded with every number.
    """

    pipe: Any
    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    #: The pipeline's own scheduler, and diffusers' number of steps.
    usual: tuple[str, int] = ("bridge", 50)
    uint8_rule: str = UINT8_RULES["half-even"].formula

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __call__(
        self,
        classes: Sequence[int | str],
        seeds: Sequence[int],
        guidance: Any,
        *,
        sampler: str = "bridge",
        steps: int = 50,
        trace: Any = "basic",
        **options: Any,
    ) -> Any:
        """One image for each class and seed; ``options`` are further ones of ``DiffusersPipeline``, such as ``grid``.

        Raises ValueError for what the model, the sampler or the guidance refuses, and for NaN.
        """
        out = self.pipe(
            class_labels=list(classes),
            seeds=list(seeds),
            guidance=guidance,
            sampler=sampler,
            num_inference_steps=steps,
            trace=trace,
            output_type="pt",
            **options,
        )
        latents = out.images.float() * 2 - 1
        pixels = UINT8_RULES["half-even"](latents)
        return SimpleNamespace(latents=latents, pixels=pixels, nfe=out.nfe, calls=out.calls, trace=out.trace)


def of_classes(found: Any, name: str) -> DiffusersClasses:
    """The pipeline around what ``genkit.load`` returned for a diffusers folder. ValueError for one that takes text."""
    pipe = found.pipe
    if not found.family.by_class:
        raise ValueError(f"{name} is a {type(pipe).__name__}, which takes text; only models of classes work")
    pipe.set_progress_bar_config(disable=True)
    config = found.network.config
    side = int(config.sample_size) * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    names = {index: label for label, index in sorted(pipe.labels.items(), reverse=True)}
    class_names = tuple(names.get(k, str(k)) for k in range(config.num_embeds_ada_norm))
    return DiffusersClasses(found, name, _fingerprint(pipe), class_names, (3, side, side))


def _fingerprint(pipe: Any) -> str:
    """SHA-256 over the weights of all networks, and what the scheduler was set to."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for part, value in sorted(pipe.components.items()):
        if isinstance(value, torch.nn.Module):
            digest.update(f"{part} {state_sha256(value)}\n".encode())
        elif hasattr(value, "config"):
            known = {key: setting for key, setting in value.config.items() if not key.startswith("_")}
            digest.update(f"{part} {type(value).__name__} {json.dumps(known, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()
