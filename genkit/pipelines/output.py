"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from PIL.Image import Image
from torch import Tensor

from genkit.guidance.trace import Trace
from genkit.pipelines.images import to_pil, to_uint8
from genkit.samplers.autoregressive.speculative import Report


@dataclass
class Output:
    """Images with their cost.

    Attributes:
        latents: what the sampler ended with (B, C, H, W), about [-1, 1] for pixel models; with tokens, the decoder's images.
        nfe: network rows spent on each sample, over all models and branches; with tokens, positions that were fed, those of
            drafted tokens too, and of what a batch decodes together.
        calls: forward passes of the whole call, those of a drafter left out.
        trace: the per-step table.
        seeds, classes, prompts: what made each image; classes or prompts is empty.
        tokens: (B, N), of models that draw tokens.
        speculation: how drafted tokens fared, if there were any: ``mean_length``, the tokens that a pass of the network gave on
            average, ``passes`` (B,), ``rates`` of acceptance by depth, ``spent``, the probability moved for a token.
    """

    latents: Tensor
    nfe: list[int]
    calls: int
    trace: Trace
    seeds: list[int]
    classes: list[int]
    prompts: list[str] = field(default_factory=list)
    tokens: Tensor | None = None
    speculation: Report | None = None

    @cached_property
    def pixels(self) -> Tensor:
        """8-bit pixels (B, 3, H, W)."""
        return to_uint8(self.latents)

    @cached_property
    def images(self) -> list[Image]:
        """PIL images."""
        return to_pil(self.pixels)
