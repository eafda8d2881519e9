"""The models of the app: each is loaded once, when it is first used."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from genkit.pipelines import load
from genkit.pipelines.images import to_pil, to_uint8
from genkit.pipelines.loading import BUILTIN
from genkit.samplers.diffusion import SAMPLERS

#: The sampler of a diffusers pipeline that is its own scheduler.
BRIDGE = "bridge"
Kind = Literal["diffusion", "next-token", "next-scale"]

_KINDS: dict[str, Kind] = {"ClassPipeline": "diffusion", "DiffusersPipeline": "diffusion", "TokenPipeline": "next-token"}


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        name: as in ``genkit.load(name)``.
        kind: how it makes images.
        pipe: the pipeline.
        class_names: empty where classes only have numbers, or for models of text.
        num_classes: None for models of text.
        device: where it runs.
    """

    name: str
    kind: Kind
    pipe: Any
    class_names: tuple[str, ...] = ()
    num_classes: int | None = None
    device: str = "cpu"

    def class_label(self, index: int) -> str:
        """The name of a class, or "class 207" where they only have numbers."""
        return self.class_names[index] if self.class_names else f"class {index}"

    @property
    def choices(self) -> list[str]:
        """What may be chosen as a class: names, or numbers where there are none; empty for models of text."""
        return list(self.class_names) or [str(k) for k in range(self.num_classes or 0)]

    def choice(self) -> dict[str, Any]:
        """What a list of classes to choose one from is drawn with; hidden for models of text."""
        names = self.choices  # Gradio's page fails if a list is emptied while it is open
        return {"choices": names, "value": names[7 % len(names)], "visible": True} if names else {"visible": False}

    @property
    def samplers(self) -> list[str]:
        """Names of samplers; the pipeline's own scheduler first, where it has one."""
        return [*([BRIDGE] if self.diffusers else []), *sorted(SAMPLERS)]

    def pictures(self, denoised: Tensor, largest: int | None = None) -> list[Image]:
        """What a diffusion model believed at a step, ``denoised`` (B, ...) in its own space, as images.

        Args:
            largest: pixels along the longer side, at most. Latents are reduced before they are decoded, which saves most of it.
        """
        if not self.diffusers:
            images = to_pil(to_uint8(denoised))
        else:
            side = max(denoised.shape[-2:]) * getattr(self.pipe.pipe, "vae_scale_factor", 8)
            fold = 1 if largest is None else math.ceil(side / largest)
            images = self.pipe.decode(F.avg_pool2d(denoised, fold, ceil_mode=True) if fold > 1 else denoised)
        if largest is not None:
            for image in images:
                image.thumbnail((largest, largest))
        return list(images)

    @property
    def diffusers(self) -> bool:
        """Whether the pipeline is one of diffusers, whose arguments differ."""
        return type(self.pipe).__name__ == "DiffusersPipeline"


class Models:
    """Models by name: the built-in ones, and those of the command line, which come first.

    Args:
        extra: names or paths, loaded at once, so that a wrong one is noticed when the app starts.
        device: where all of them run.

    Raises:
        ValueError, FileNotFoundError: as ``genkit.load`` does.
    """

    def __init__(self, extra: Sequence[str] = (), device: str = "cpu") -> None:
        self.device = device
        self._lock, self._loaded = threading.Lock(), dict[str, Model]()
        for name in extra:
            try:
                self.get_new(name)
            except (ValueError, FileNotFoundError, ImportError):
                raise
            except Exception as error:  # diffusers and the hub have many of their own
                raise ValueError(f"model={name!r} cannot be loaded ({type(error).__name__}: {error})") from error
        self.names: tuple[str, ...] = tuple(dict.fromkeys((*extra, *BUILTIN)))

    def of_kind(self, *kinds: Kind) -> tuple[str, ...]:
        """Names of the models of these kinds."""
        return tuple(name for name in self.names if self.kind(name) in kinds)

    def kind(self, name: str) -> Kind:
        """The kind of a model, without loading one that is built in. Raises KeyError for a model the app does not have."""
        if name in self._loaded:
            return self._loaded[name].kind
        if name not in self.names:
            raise KeyError(name)
        return "next-scale" if "next-scale" in name else "next-token" if "next-token" in name else "diffusion"

    def get(self, name: str) -> Model:
        """The model, loaded if it was not yet. Raises KeyError for a name the app does not have: no others are ever loaded."""
        if name not in self.names:
            raise KeyError(name)
        return self.get_new(name)

    def get_new(self, name: str) -> Model:
        """The model of any name."""
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def warm_up(self) -> None:
        """Load the first model and make an image in one step: the first call of a network is slower than those that follow."""
        model = self.get(self.names[0])
        if model.kind == "diffusion" and not model.diffusers:
            model.pipe(classes=[0], guidance="CFG(2.0)", steps=1)

    def _load(self, name: str) -> Model:
        pipe = load(name, device=self.device)
        if hasattr(pipe, "pipe"):
            pipe.pipe.set_progress_bar_config(disable=True)  # the page has its own
        kind = _KINDS.get(type(pipe).__name__, "next-scale")
        names, count = _classes(pipe)
        return Model(name, kind, pipe, names, count, self.device)


def _classes(pipe: Any) -> tuple[tuple[str, ...], int | None]:
    """Names of the classes and their number; (), None for a model of text."""
    if hasattr(pipe, "num_classes"):
        return tuple(pipe.class_names), pipe.num_classes
    labels: dict[str, int] = getattr(pipe.pipe, "labels", None) or {}  # diffusers' DiT: names to numbers, several to one
    if not hasattr(pipe.pipe, "get_label_ids"):
        return (), None
    return (), max(labels.values(), default=999) + 1


__all__ = ["BRIDGE", "Kind", "Model", "Models"]
