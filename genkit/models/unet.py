"""A small class-conditional U-Net for CPUs: most of its work is at half resolution, where convolutions are wide and cheap."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.guidance.base import Perturbation
from genkit.models import perturb


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a :class:`UNet`. Stored beside the weights; every field is a plain value."""

    image_size: int = 32
    image_channels: int = 3
    num_classes: int = 10
    patch: int = 2  # pixels are unshuffled by this factor before the first convolution
    channels: tuple[int, ...] = (48, 96, 128)  # one entry per resolution, each half the one before
    blocks: int = 1  # residual blocks per resolution, on the way down and on the way up
    attention: tuple[int, ...] = (1, 2)  # levels (indices into ``channels``) that end with self-attention
    embedding: int = 192
    groups: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        smallest = self.image_size // self.patch // 2 ** (len(self.channels) - 1)
        if smallest < 1 or smallest * self.patch * 2 ** (len(self.channels) - 1) != self.image_size:
            raise ValueError(
                f"image_size={self.image_size} must be divisible by patch * 2**(levels - 1) = "
                f"{self.patch * 2 ** (len(self.channels) - 1)}"
            )
        if any(c % self.groups for c in self.channels):
            raise ValueError(f"channels={self.channels} must all be divisible by groups={self.groups}")


class ResBlock(nn.Module):
    """Norm, convolution, modulation by the embedding, convolution; the last starts at zero, so a new block is the identity."""

    def __init__(self, c_in: int, c_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if perturb.active(self):  # a block has one way to be weakened: it is skipped
            passed: Tensor = self.skip(x)
            return passed
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(F.silu(torch.addcmul(h + shift, h, scale)))
        out: Tensor = self.skip(x) + h
        return out


class SelfAttention(nn.Module):
    """Single-head-per-32-channels self-attention over all positions, with a residual connection that starts at zero."""

    attention_backend: str | None = None

    def __init__(self, channels: int, groups: int, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        perturbation = perturb.active(self)
        if perturbation is not None and perturbation.kind == "skip":
            return x
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        q, k, v = qkv.unbind(1)
        y = perturb.attention(q, k, v, h, w, perturbation, self.attention_backend).transpose(-1, -2).reshape(b, c, h, w)
        out: Tensor = x + self.out(y)
        return out


class NoiseEmbedding(nn.Module):
    """Fourier features of the scalar noise condition ``c_noise = ln(sigma) / 4``, followed by one linear layer."""

    frequencies: Tensor

    def __init__(self, embedding: int, features: int = 64) -> None:
        super().__init__()
        octaves = torch.linspace(math.log(0.5), math.log(64.0), features // 2).exp()
        self.register_buffer("frequencies", octaves, persistent=False)
        self.linear = nn.Linear(features, embedding)

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        out: Tensor = self.linear(torch.cat([angles.cos(), angles.sin()], dim=1))
        return out


class UNet(nn.Module):
    """``F(x, c_noise, label)``: image (B, C, H, W), noise condition (B,), integer labels (B,) to an image of the same shape.

    Label ``num_classes`` is the dropped label: the unconditional branch. In place of labels their embeddings (B, e) are taken.

    Layers that :meth:`perturbed` can weaken are named as in the state dict: ``"down.4.1"`` is an attention where that level has
    one, ``"down.4.0"`` the block before it, ``"down.4"`` both, ``"down"`` and ``"up"`` all on the way down and up, ``"middle"``
    the block between. ``"mid"``, the default: the last attention before and the first after the middle; for a skip, the middle.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c, e, g = config.channels, config.embedding, config.groups
        self.noise = NoiseEmbedding(e)
        self.label = nn.Embedding(config.num_classes + 1, e)
        self.mix = nn.Linear(e, e)
        pixels = config.image_channels * config.patch**2
        self.stem = nn.Conv2d(pixels, c[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = c[0], list[int]()
        for level, out in enumerate(c):
            for _ in range(config.blocks):
                self.down.append(self._stage(width, out, level))
                width = out
                skips.append(width)
            if level + 1 < len(c):
                self.down.append(nn.AvgPool2d(2))
        self.middle = ResBlock(width, width, e, g)
        for level, out in reversed(list(enumerate(c))):
            for _ in range(config.blocks):
                self.up.append(self._stage(width + skips.pop(), out, level))
                width = out
            if level:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.out_norm = nn.GroupNorm(g, width)
        self.out = nn.Conv2d(width, pixels, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def _stage(self, c_in: int, c_out: int, level: int) -> nn.ModuleList:
        stage = nn.ModuleList([ResBlock(c_in, c_out, self.config.embedding, self.config.groups)])
        if level in self.config.attention:
            stage.append(SelfAttention(c_out, self.config.groups))
        return stage

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def embed(self, label: Tensor) -> Tensor:
        """Embeddings (B, e) of integer labels (B,); what is real-valued already comes back."""
        out: Tensor = label.to(self.label.weight.dtype) if label.is_floating_point() else self.label(label)
        return out

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context, in this thread, the layers of the perturbation are weakened.

        Raises:
            ValueError: a layer this network does not have, or that cannot be weakened in this way.
        """
        skip = perturbation.kind == "skip"
        kinds = (SelfAttention, ResBlock) if skip else (SelfAttention,)
        layers = {name: module for name, module in self.named_modules() if isinstance(module, kinds)}
        down, up = ([name for name in layers if name.startswith(way)] for way in ("down.", "up."))
        mid = ["middle"] if skip else down[-1:] + up[:1]
        layers |= {f"mid.{name}": layers[name] for name in mid}
        return perturb.weakened(perturb.select(layers, perturbation.layers or ("mid",)), perturbation)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        emb = F.silu(self.mix(F.silu(self.noise(c_noise) + self.embed(label))))
        h = self.stem(F.pixel_unshuffle(x, self.config.patch))
        skips = []
        for layer in self.down:
            h = _apply(layer, h, emb)
            if isinstance(layer, nn.ModuleList):
                skips.append(h)
        h = self.middle(h, emb)
        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                h = torch.cat([h, skips.pop()], dim=1)
            h = _apply(layer, h, emb)
        h = self.out(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, self.config.patch)


def _apply(layer: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    if not isinstance(layer, nn.ModuleList):
        out: Tensor = layer(h)
        return out
    for part in layer:
        h = part(h, emb) if isinstance(part, ResBlock) else part(h)
    return h
