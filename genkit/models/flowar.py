"""FlowAR: a transformer over latents of growing size, each scale drawn by a flow (Ren et al. 2024)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Mask
from genkit.models.autoregressive import Conditioned, KeyValueCache, LayerCache, Scales
from genkit.models.compiled import Region
from genkit.models.flowar_velocity import Attention, GatedMLP, VelocityConfig, VelocityNetwork, modulated
from genkit.weights import fit, read_weights


@dataclass(frozen=True)
class FlowARConfig:
    """Shape of a :class:`FlowAR`.

    Args:
        width, depth: of the transformer, half of the blocks each in its two halves. heads: None is width / 64.
        flow_width, flow_depth, cross: of the velocity network; see :class:`genkit.models.flowar_velocity.VelocityConfig`.
        patch_nums: sides of the scales. channels: of the latents.
        num_classes: labels 0 .. num_classes - 1; the label num_classes stands for none.
    """

    width: int
    depth: int
    flow_width: int
    flow_depth: int
    cross: bool
    heads: int | None = None
    flow_heads: int | None = None
    patch_nums: tuple[int, ...] = (1, 2, 4, 8, 16)
    channels: int = 16
    num_classes: int = 1000


#: Released models, on latents of MAR's KL-16 autoencoder times 0.2325.
FLOWAR_SIZES = {
    "S": FlowARConfig(768, 12, 1024, 2, cross=False),
    "L": FlowARConfig(1024, 16, 1024, 12, cross=True),
    "H": FlowARConfig(1536, 30, 1536, 12, cross=True),
}


class Block(nn.Module):
    """``x + gamma f(norm(x) (1 + scale) + shift)``, f attention and then the MLP; the six come from the class (AdaLN)."""

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, grid, bias=True), GatedMLP(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, embedded: Tensor, sides: tuple[int, ...], cache: LayerCache | None, mask: Mask | Tensor | None
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada_lin(embedded)[:, None].chunk(6, -1)
        x = x + gamma1 * self.attn(modulated(x, scale1, shift1), sides, cache, mask)
        out: Tensor = x + gamma2 * self.mlp(modulated(x, scale2, shift2))
        return out


class FlowAR(Conditioned):
    """Conditions z_k of each scale from the scales before it, and a flow ``p(x_k | z_k)``, x_k the latent at the size of scale k.

    Args:
        config: a row of :data:`FLOWAR_SIZES`, or one of your own.

    Raises:
        ValueError: the width is no multiple of the heads, the depth is odd, or the scales do not grow.
    """

    config: FlowARConfig
    encoder_pos_embed_learned: nn.Parameter
    decoder_pos_embed_learned: nn.Parameter
    diffusion_pos_embed_learned: nn.Parameter

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        self.config = c = config
        self.width, self.heads, half = c.width, c.heads or max(1, c.width // 64), c.depth // 2
        if c.width % self.heads or c.depth % 2:
            raise ValueError(f"width={c.width}, depth={c.depth}: width must be a multiple of heads={self.heads}, depth even")
        self.scales, w = Scales(c.patch_nums), c.width
        self.first, self.grid = self.scales.ends[0], c.patch_nums[-1]
        self.class_emb = nn.Embedding(c.num_classes + 1, w)
        self.z_proj, self.z_proj_ln = nn.Linear(c.channels, w), nn.RMSNorm(w, 1e-6)
        for name in ("encoder", "decoder", "diffusion"):
            self.register_parameter(f"{name}_pos_embed_learned", nn.Parameter(torch.empty(1, self.scales.length, w)))
        self.encoder_blocks = nn.ModuleList(Block(w, self.heads, self.grid) for _ in range(half))
        self.encoder_norm = nn.RMSNorm(w, 1e-6)
        self.decoder_embed = nn.Linear(w, w)
        self.decoder_blocks = nn.ModuleList(Block(w, self.heads, self.grid) for _ in range(half))
        self.decoder_norm = nn.RMSNorm(w, 1e-6)
        self.flownet = VelocityNetwork(
            VelocityConfig(c.flow_width, c.flow_depth, w, c.cross, c.flow_heads, c.channels, self.grid)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: Xavier for matrices, deviation 0.02 for embeddings, zero for what AdaLN and the output start from."""
        if self.z_proj.weight.is_meta:  # nothing to draw
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, value in self.named_parameters():
            if "pos_embed" in name or name == "class_emb.weight":
                nn.init.normal_(value, std=0.02)
            elif "ada" in name or "final_layer" in name:
                nn.init.zeros_(value)

    @property
    def length(self) -> int:
        """Positions of an image."""
        return self.scales.length

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the cache it writes to."""
        return len(self.encoder_blocks) + len(self.decoder_blocks), self.heads, self.width // self.heads

    def regions(self) -> list[Region]:
        """What :func:`genkit.models.compiled.compile_regions` compiles: the velocity, at each scale."""
        return [Region(self.flownet, "forward", "each")]

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor,
        cache: KeyValueCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the velocity network is conditioned on, (B, n, width), for whole scales from position ``start`` on.

        Args:
            inputs: (B, n, C), see :meth:`next_input`. The first scale is fed the condition alone: anything can stand there.
            condition: labels (B,).
            cache: of all positions before ``start``.
            mask: (n, start + n) or (B, 1, n, start + n), True where a position sees another. Default: it sees all of its own
                scale and of those before.

        Raises:
            ValueError: the positions are no whole scales.
        """
        n = inputs.shape[1]
        sides, span = self.scales.at(start, n), slice(start, start + n)
        embedded = self.class_emb(condition)
        x = self.z_proj(inputs[:, self.first :] if start == 0 else inputs)
        if start == 0:
            x = torch.cat((embedded[:, None].expand(-1, self.first, -1), x), 1)
        look = self.scales.mask(start, n) if mask is None else mask
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, span])
        layer = 0
        for half in ("encoder", "decoder"):
            if half == "decoder":
                x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, span]
            for block in self.get_submodule(f"{half}_blocks").children():
                x = block(x, embedded, sides, None if cache is None else LayerCache(cache, layer, start), look)
                layer += 1
        out: Tensor = self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, span]
        return out

    def next_input(self, latent: Tensor, scale: int) -> Tensor:
        """The input (B, p'^2, C) of a scale, counted from 0, from the latent (B, p^2, C) before: area(bicubic(x))."""
        side = self.config.patch_nums[scale - 1]
        image = latent.mT.unflatten(-1, (side, side))
        image = F.interpolate(image, size=(self.grid, self.grid), mode="bicubic")
        return F.interpolate(image, size=(self.config.patch_nums[scale],) * 2, mode="area").flatten(2).mT

    def loss(self, latent: Tensor, condition: Tensor, times: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
        """``sum_k p_k^2 / P^2 mean |v(x_t, t, z_k) - (n - x_k)|^2``, x_k the latent shrunk to scale k (Ren et al. 2024, eq. 4).

        Args:
            latent: (B, C, P, P). condition: labels (B,), some of them dropped.
            times: (B,) of each scale. noise: (B, p_k^2, C) of each scale.
        """
        sides = self.config.patch_nums
        clean = [F.interpolate(latent, size=(p, p), mode="area").flatten(2).mT for p in sides]
        inputs = [clean[0].new_zeros(len(latent), self.first, self.config.channels)]
        inputs += [self.next_input(x, k + 1) for k, x in enumerate(clean[:-1])]
        conditions = self(torch.cat(inputs, 1), condition).split([p * p for p in sides], 1)
        terms = []
        for p, x, z, t, n in zip(sides, clean, conditions, times, noise, strict=True):
            share = t[:, None, None]
            v = self.flownet((1 - share) * x + share * n, t, z)
            terms.append(F.mse_loss(v, n - x) * (p / self.grid) ** 2)
        return torch.stack(terms).sum()

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a released file into this network, and put it in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, does not fit (the first keys are named), or holds NaN.
        """
        fit(self, read_weights(path), path, ignore=("mask",), what="this FlowAR")
        return self.eval()


def time_grid(steps: int) -> Tensor:
    """FlowAR's times, falling from 1 to 0: evenly for 50 steps, else N/2 from 1 to 0.3 and N/2 more from 0.25 to 0.

    An odd number of steps makes one step less.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: use at least 2")
    if steps == 50:
        return torch.linspace(1, 0, 51, dtype=torch.float64)
    half = steps // 2
    return torch.cat((torch.linspace(1, 0.3, half, dtype=torch.float64), torch.linspace(0.25, 0, half + 1, dtype=torch.float64)))
