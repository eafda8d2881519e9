"""Saturation, contrast and clipping of uint8 images: what over-strong guidance shows first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.registry import PIXEL_LAYER, Spec, register
from genkit_eval.metrics.sample import Pair

LUMA = (0.299, 0.587, 0.114)


def saturation(pixels: Tensor) -> Tensor:
    """Mean HSV saturation (N,) in 0..1: ``(max - min) / max`` over the channels, 0 for black."""
    high, low = pixels.amax(dim=1).double(), pixels.amin(dim=1).double()
    return torch.where(high > 0, (high - low) / high.clamp(min=1), 0.0).mean(dim=(1, 2))


def contrast(pixels: Tensor) -> Tensor:
    """RMS contrast (N,) in 0..0.5: standard deviation over the pixels of the luminance 0.299 R + 0.587 G + 0.114 B, in 0..1."""
    weights = torch.tensor(LUMA, dtype=torch.float64).reshape(1, 3, 1, 1)
    return ((pixels.double() / 255) * weights).sum(dim=1).flatten(1).std(dim=1, correction=0)


def clipped(pixels: Tensor) -> Tensor:
    """Fraction (N,) of pixels with a channel at 0 or 255."""
    return ((pixels == 0) | (pixels == 255)).any(dim=1).double().mean(dim=(1, 2))


#: What is kept of the pixels themselves, one number for each image.
PIXEL_COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    PIXEL_LAYER + "saturation": saturation,
    PIXEL_LAYER + "contrast": contrast,
    PIXEL_LAYER + "clipped": clipped,
}


def pixel_layers(pixels: Tensor) -> dict[str, Tensor]:
    """Layers (N, 1) with the numbers of uint8 images (N, 3, H, W), some at a time: the metrics compute in float64."""
    parts = pixels.split(64)
    return {
        name: torch.cat([of(part) for part in parts])[:, None] if len(pixels) else torch.zeros(0, 1)
        for name, of in PIXEL_COLUMNS.items()
    }


def _register(name: str, variant: str, of_pixels: Callable[[Tensor], Tensor], high: float) -> None:
    def contributions(pair: Pair) -> Tensor:
        pixels, known = pair.fake.pixels, pair.fake.layers.get(PIXEL_LAYER + name)
        if known is not None:
            return known[:, 0].double()
        if pixels is None:
            raise ValueError(f"pixels: {name} needs the uint8 images of the generated set")
        return pair.fake.once(name, lambda: torch.cat([of_pixels(part) for part in pixels.split(1024)]))

    def replicates(pair: Pair, counts: Counts) -> Tensor:
        return counts.fake @ contributions(pair) / len(pair.fake)

    value: Callable[[Pair], float] = lambda pair: float(contributions(pair).mean())  # noqa: E731
    register(
        Spec(
            name=name,
            title=name.capitalize(),
            variant=variant,
            better="neither",
            source="pixels",
            value=value,
            replicates=replicates,
            interval_of="generated images",
            bounds=(0.0, high),
            reference="none",
        )
    )


_register("saturation", "saturation/hsv-mean", saturation, 1.0)
_register("contrast", "contrast/rms-rec601", contrast, 0.5)
_register("clipped", "clipped/any-channel", clipped, 1.0)
