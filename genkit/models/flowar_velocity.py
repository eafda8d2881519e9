"""FlowAR's layers, and its velocity networks: what turns noise into the latents of one scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Mask, attention
from genkit.attention.kernels import modulate, qk_norm_rope, usable
from genkit.models.autoregressive import LayerCache, wide
from genkit.noise import FLOW, Path


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) (1 + scale) + shift``."""
    return modulate(x, scale, shift, norm="rms") if usable(x, scale, shift) else rms_norm(x) * (1 + scale) + shift


class Rope(nn.Module):
    """Rotary positions on maps (Su et al. 2021): half of the pairs turn with the row, half with the column.

    Frequencies are ``10000^(-4 i / head_dim)``. Places on a map of side p count in steps of ``grid / p``: maps of all sizes
    cover the same range.
    """

    freqs: Tensor

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, head_dim, 4) / head_dim))

    def table(self, sides: tuple[int, ...]) -> Tensor:
        """Angles (n, head_dim / 2) of the places on maps of these sides, one after the other."""
        angles = []
        for p in sides:
            turn = torch.arange(p, device=self.freqs.device)[:, None] * (self.grid / p) * wide(self.freqs)
            row, column = turn[:, None].expand(p, p, -1), turn[None].expand(p, p, -1)
            angles.append(torch.cat((row, column), -1).flatten(0, 1))
        return torch.cat(angles)

    def forward(self, sides: tuple[int, ...], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (B, heads, n, head_dim), turned; channels 2 i and 2 i + 1 are a pair."""
        angles = self.table(sides)
        if usable(q, k):
            return qk_norm_rope(q, k, torch.stack((angles.cos(), angles.sin()), -1))
        turn = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2))
        q, k = ((turn.to(x.dtype) @ x.unflatten(-1, (-1, 2, 1))).flatten(-3) for x in (q, k))
        return q, k


class Attention(nn.Module):
    """Self-attention with :class:`Rope`."""

    attention_backend: str | None = None

    def __init__(self, width: int, heads: int, grid: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        self.rope = Rope(width // heads, grid)

    def forward(
        self, x: Tensor, sides: tuple[int, ...], cache: LayerCache | None = None, mask: Mask | Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(sides, q, k)
        k, v = (k, v) if cache is None else cache(k, v)
        looked = attention(q, k, v, mask=mask, default=self.attention_backend)
        out: Tensor = self.proj(looked.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention of a map to the conditions (B, n, e) of its own places, with :class:`Rope` on both."""

    attention_backend: str | None = None

    def __init__(self, width: int, condition: int, heads: int, grid: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(condition, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.rope = Rope(width // heads, grid)

    def forward(self, x: Tensor, z: Tensor, sides: tuple[int, ...]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(z).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(sides, q, k)
        out: Tensor = self.proj(attention(q, k, v, default=self.attention_backend).transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """``W2 (gelu(W_g x) * W_x x)`` (Shazeer 2020), two thirds as wide as an MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width * 4 * 2 / 3)
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x))
        return out


class Clues(NamedTuple):
    """What a velocity block is told: the embedded time (B, 1, w), with the embedded condition (B, n, w), and that one raw."""

    time: Tensor
    both: Tensor
    raw: Tensor


class SpatialBlock(nn.Module):
    """Attention and MLP, each under an AdaLN that differs from place to place: it is made of time and condition."""

    def __init__(self, width: int, condition: int, heads: int, grid: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, grid, bias=False), GatedMLP(width)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, clues: Clues, sides: tuple[int, ...]) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada_lin(F.silu(clues.both)).chunk(6, -1)
        x = x + gamma1 * self.attn(modulated(x, scale1, shift1), sides)
        out: Tensor = x + gamma2 * self.mlp(modulated(x, scale2, shift2))
        return out


class CrossBlock(nn.Module):
    """Attention under the AdaLN of the time, cross-attention to the condition, MLP under the AdaLN of both."""

    def __init__(self, width: int, condition: int, heads: int, grid: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, grid, bias=False), GatedMLP(width)
        self.crossattn = CrossAttention(width, condition, heads, grid)
        self.norm2_1, self.norm2_2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(condition, 1e-6)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, clues: Clues, sides: tuple[int, ...]) -> Tensor:
        gamma, scale, shift = self.ada_lin_attn(F.silu(clues.time)).chunk(3, -1)
        x = x + gamma * self.attn(modulated(x, scale, shift), sides)
        x = x + self.crossattn(self.norm2_1(x), self.norm2_2(clues.raw), sides)
        gamma, scale, shift = self.ada_lin_mlp(F.silu(clues.both)).chunk(3, -1)
        out: Tensor = x + gamma * self.mlp(modulated(x, scale, shift))
        return out


class TimeEmbedding(nn.Module):
    """256 cosines and sines of ``floor(1000 t)``, frequencies ``10000^(-i / 128)``, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # A time that comes from a noise level may miss a whole number by a rounding error.
        whole = (1000 * t.double() + 1e-6).floor().float()
        angles = whole[:, None] * torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        features = torch.cat((angles.cos(), angles.sin()), -1)
        out: Tensor = self.mlp(features.to(next(self.parameters()).dtype))
        return out


class FinalLayer(nn.Module):
    """The AdaLN before the output, and the output."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(both).chunk(2, -1)
        out: Tensor = self.linear(modulated(x, scale, shift))
        return out


@dataclass(frozen=True)
class VelocityConfig:
    """Shape of a :class:`VelocityNetwork`.

    Args:
        width, depth, heads: of its blocks; heads None is width / 64.
        condition: width of what it is conditioned on.
        cross: blocks with cross-attention in place of those with AdaLN alone.
        channels: of the latents. grid: side of the largest map.
    """

    width: int
    depth: int
    condition: int
    cross: bool
    heads: int | None = None
    channels: int = 16
    grid: int = 16


class VelocityNetwork(nn.Module):
    """``v(x_t, t, z)``, the velocity ``n - x_0`` of the flow ``x_t = (1 - t) x_0 + t n``, on a map (Ren et al. 2024)."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        c, block = config, CrossBlock if config.cross else SpatialBlock
        heads = c.heads or max(1, c.width // 64)
        self.input_proj, self.cond_embed = nn.Linear(c.channels, c.width), nn.Linear(c.condition, c.width)
        self.time_embed = TimeEmbedding(c.width)
        self.res_blocks = nn.ModuleList(block(c.width, c.condition, heads, c.grid) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.channels)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Velocity (B, p^2, C) at x (B, p^2, C) and times t (B,) from 0 to 1, given z (B, p^2, e)."""
        time = self.time_embed(t)[:, None]
        clues, sides = Clues(time, time + self.cond_embed(z), z), (round(x.shape[1] ** 0.5),)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, clues, sides)
        out: Tensor = self.final_layer(x, clues.both)
        return out


class FlowDenoiser:
    """A velocity network as a denoiser: ``D = x_t - t v``.

    Args:
        network: called with x in the dtype of its weights, t and the condition.
    """

    path: Path = FLOW

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        t = torch.where(sigma.isinf(), 1.0, sigma / (1 + sigma))
        v: Tensor = self.network(x.to(next(self.network.parameters()).dtype), t, condition)
        return x - t.to(x.dtype)[:, None, None] * v.to(x.dtype)
