"""The networks of a pipeline, of any kind."""

from __future__ import annotations

from typing import Any

from torch import nn

from genkit.pipelines.compiling import Compiling

NAMES = ("unet", "transformer", "transformer_2", "prior", "controlnet")


def networks(target: Any) -> list[nn.Module]:
    """The networks that predict in a pipeline, of diffusers or of genkit; or ``target`` itself, where it is a network.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(target, nn.Module):
        return [target]
    pipe = getattr(target, "pipe", target)
    found = [part for name in NAMES if isinstance(part := getattr(pipe, name, None), nn.Module)]
    if not found and isinstance(target, Compiling):
        found = [network for network in target._compilable() if isinstance(network, nn.Module)]
    if not found:
        raise ValueError(
            f"{type(target).__name__} is no network, and has none: give a network, or a pipeline with {', '.join(NAMES)}"
        )
    return found


__all__ = ["networks"]
