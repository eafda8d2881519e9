"""VAR and VAR-CLIP: transformers that predict a pyramid of token maps, one scale at a time (Tian et al. 2024)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from genkit.guidance.base import Perturbation
from genkit.models import perturb
from genkit.models.autoregressive import Conditioned, KeyValueCache, LayerCache, Logits, Scales, wide
from genkit.models.compiled import INSIDE, Region
from genkit.models.var_layers import Block, Modulation, last
from genkit.weights import fit, read_weights

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class VARConfig:
    """Shape of a :class:`VAR`.

    Args:
        depth: number of blocks.
        width, heads: of the blocks; None is the released 64 depth, and depth.
        patch_nums: sides of the scales; L is the sum of their squares.
        vocabulary, code_dim: V and C of the tokenizer.
        num_classes: labels 0 .. num_classes - 1; the label num_classes stands for none. Not used with ``text_dim``.
        text_dim: VAR-CLIP: conditions are text embeddings of this width, in place of labels.
        shared_adaln: one AdaLN for all blocks, with offsets learned by each (the 512 model).
        l2_norm: cosine attention with a learned scale for each head.
    """

    depth: int
    width: int | None = None
    heads: int | None = None
    patch_nums: tuple[int, ...] = SCALES_256
    vocabulary: int = 4096
    code_dim: int = 32
    num_classes: int = 1000
    text_dim: int | None = None
    shared_adaln: bool = False
    l2_norm: bool = True


#: The released models, by the name of their file; ``clip`` is VAR-CLIP with the text encoder of CLIP ViT-L/14.
VAR_SIZES = {
    "d16": VARConfig(16),
    "d20": VARConfig(20),
    "d24": VARConfig(24),
    "d30": VARConfig(30),
    "d36": VARConfig(36, patch_nums=SCALES_512, shared_adaln=True),
    "clip": VARConfig(16, text_dim=768),
}


class VAR(Conditioned):
    """The tokens r_k of scale k from the sum of the scales before it: ``p(r_1, ..., r_K | c) = prod_k p(r_k | r_<k, c)``.

    Names and shapes of its weights are those of the released files.

    Layers that :meth:`perturbed` can weaken: ``"blocks.0"``, ``"blocks.1"``, ...; the default is the one in the middle.

    Args:
        config: a row of :data:`VAR_SIZES`, or one of your own.

    Raises:
        ValueError: the width is no multiple of the heads, or the scales do not grow.
    """

    config: VARConfig
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = c = config
        self.width, self.heads = c.width or 64 * c.depth, c.heads or c.depth
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        self.scales, w = Scales(c.patch_nums), self.width
        self.first = self.scales.ends[0]
        self.word_embed = nn.Linear(c.code_dim, w)
        if c.text_dim is None:
            self.class_emb = nn.Embedding(c.num_classes + 1, w)
        else:
            self.cond_proj, self.noise = nn.Linear(c.text_dim, w), nn.Embedding(1, c.text_dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.first, w))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.scales.length, w))
        self.lvl_embed = nn.Embedding(len(c.patch_nums), w)
        level = torch.tensor([[i for i, p in enumerate(c.patch_nums) for _ in range(p * p)]])
        self.register_buffer("lvl_1L", level)
        # Part of the released layout; the mask in use is made anew, as booleans.
        later = (level[..., None] < level[:, None])[None]
        self.register_buffer("attn_bias_for_masking", torch.zeros(later.shape).masked_fill(later, -math.inf))
        if c.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(w, 6 * w))
        options = {"l2_norm": c.l2_norm, "shared_adaln": c.shared_adaln}
        self.blocks = nn.ModuleList(Block(w, self.heads, **options) for _ in range(c.depth))
        self.head_nm = Modulation(w)
        self.head = nn.Linear(w, c.vocabulary)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: truncated normal of variance 1 / (3 width), small residual gains and head, as VAR's training does."""
        if self.pos_start.is_meta:  # nothing to draw
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / self.width / 3))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=math.sqrt(1 / self.width / 3))
        self.head.weight.mul_(0.02)
        last(self.head_nm.ada_lin).weight.mul_(0.5)
        for module in self.modules():
            if isinstance(module, Block):
                module.reset_parameters(self.config.depth)

    @property
    def length(self) -> int:
        """Positions of an image."""
        return self.scales.length

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the cache it writes to."""
        return len(self.blocks), self.heads, self.width // self.heads

    def null(self, batch: int) -> Tensor:
        """The condition that stands for none: labels (B,), or the learned embedding (B, text_dim) of VAR-CLIP."""
        if self.config.text_dim is not None:
            return self.noise.weight.expand(batch, -1)
        labels: Tensor = super().null(batch)
        return labels

    def embed(self, condition: Tensor) -> Tensor:
        """Labels (B,) as embeddings (B, width), which :meth:`forward` takes in their place. Text embeddings stay."""
        if self.config.text_dim is not None or condition.is_floating_point():
            return condition
        out: Tensor = self.class_emb(condition)
        return out

    def prepare(self, condition: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` makes of conditions, once for all scales; it takes this in their place.

        Their embeddings (B, width), what AdaLN does in each block, (B, depth, 6, width), and before the head, (B, 2 width).
        """
        embedded = self.embed(condition) if self.config.text_dim is None else self.cond_proj(condition)
        shared = self.shared_ada_lin(embedded).view(-1, 6, self.width) if self.config.shared_adaln else None
        blocks = torch.stack([cast(Block, block).modulation(embedded, shared) for block in self.blocks], 1)
        return {"embedded": embedded, "blocks": blocks, "head": self.head_nm.ada_lin(embedded)}

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context, in this thread, the layers of the perturbation are weakened.

        Raises:
            ValueError: a layer this network does not have.
        """
        part = "" if perturbation.kind == "skip" else ".attn"
        layers = {f"blocks.{i}": self.get_submodule(f"blocks.{i}{part}") for i in range(len(self.blocks))}
        middle = (f"blocks.{len(layers) // 2}",)
        return perturb.weakened(perturb.select(layers, perturbation.layers or middle), perturbation)

    def regions(self) -> list[Region]:
        """What :func:`genkit.models.compiled.compile_regions` compiles: the blocks, once for all scales."""
        return [Region(block, "forward", "many", ((), *INSIDE)) for block in self.blocks]

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | Mapping[str, Tensor],
        cache: KeyValueCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
    ) -> Logits:
        """Logits of whole scales, from position ``start`` on.

        Args:
            inputs: (B, n, C), the sums of the scales before, at the sizes of those asked for: what
                :meth:`genkit.tokenizers.multiscale.MultiScale.next_inputs` returns, after the first scale. That one is fed the
                condition alone: anything can stand in its place.
            condition: labels (B,), their embeddings, or text embeddings (B, text_dim); or what :meth:`prepare` made of them.
            cache: of all positions before ``start``.
            mask: (n, start + n) or (B, 1, n, start + n), True where a position sees another. Default: it sees all of its own
                scale and of those before.

        Raises:
            ValueError: the positions are no whole scales.
        """
        n = inputs.shape[1]
        sides, span = self.scales.at(start, n), slice(start, start + n)
        given = condition if isinstance(condition, Mapping) else self.prepare(condition)
        if start == 0:
            x = torch.cat((given["embedded"][:, None] + self.pos_start, self.word_embed(inputs[:, self.first :])), 1)
        else:
            x = self.word_embed(inputs)
        x = x + (self.lvl_embed(self.lvl_1L[:, span]) + self.pos_1LC[:, span])
        look = self.scales.mask(start, n) if mask is None else mask
        for i, (block, modulation) in enumerate(zip(self.blocks, given["blocks"].unbind(1), strict=True)):
            x = block(x, modulation, sides, None if cache is None else LayerCache(cache, i, start), look)
        normed = self.head_nm(x, given["head"]).to(self.head.weight.dtype)
        return Logits(wide(self.head(normed)), x)

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a released file or of VAR's training into this network, and put it in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, does not fit (the first keys are named), or holds NaN.
        """
        weights = read_weights(path, parts=("var_wo_ddp",))
        for key, value in weights.items():  # the official code writes (1, 1, heads, 1) where it has its own kernels
            if key.endswith("scale_mul_1H11") and value.shape == (1, 1, self.heads, 1):
                weights[key] = value.transpose(1, 2)
        fit(self, weights, path, what="this VAR")
        return self.eval()
