"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from PIL.Image import Image
from torch import Tensor

from genkit.guidance.trace import Trace
from genkit.pipelines.images import to_pil, to_uint8


@dataclass
class Output:
    """Images with their cost.

    Attributes:
        latents: what the sampler ended with (B, C, H, W), about [-1, 1] for pixel models.
        nfe: network rows spent on each sample, over all models and branches.
        calls: forward passes of the whole call.
        trace: the per-step table.
        seeds, classes: what made each image.
    """

    latents: Tensor
    nfe: list[int]
    calls: int
    trace: Trace
    seeds: list[int]
    classes: list[int]

    @cached_property
    def pixels(self) -> Tensor:
        """8-bit pixels (B, 3, H, W)."""
        return to_uint8(self.latents)

    @cached_property
    def images(self) -> list[Image]:
        """PIL images."""
        return to_pil(self.pixels)
