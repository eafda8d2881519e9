"""Open-MAGVIT2's generator: a Llama over tokens that are predicted in two parts (Luo et al. 2024, sec. 3.2)."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Causal, Mask
from genkit.guidance.base import Perturbation
from genkit.models import llama, perturb
from genkit.models.autoregressive import Conditioned, KeyValueCache, LayerCache, Logits
from genkit.models.compiled import INSIDE, Region
from genkit.models.llamagen import ClassEmbedding
from genkit.weights import fit, read_weights


@dataclass(frozen=True)
class OpenMAGVIT2Config:
    """Shape of an :class:`OpenMAGVIT2`.

    Args:
        layers: blocks over the image's tokens.
        part_layers: blocks over the two parts of a token.
        heads, width: of both.
        bits: of the two parts, lowest first.
        tokens: of an image, a square.
        num_classes: number of labels.
        multiple: the feed-forward width is a multiple of it.
        dropout: share of values dropped in training, at the embedding and behind attention and feed-forward.
    """

    layers: int
    part_layers: int
    heads: int
    width: int
    bits: tuple[int, int] = (6, 12)
    tokens: int = 256
    num_classes: int = 1000
    multiple: int = 256
    dropout: float = 0.1


OPEN_MAGVIT2_SIZES = {
    "B": OpenMAGVIT2Config(24, 2, 16, 1024),
    "L": OpenMAGVIT2Config(36, 3, 20, 1280),
    "XL": OpenMAGVIT2Config(48, 4, 24, 1536),
}
#: Guidance scales and temperatures of the two parts, as the released models were evaluated.
OPEN_MAGVIT2_SAMPLING = {
    "B": {"scales": (1.9, 2.0), "temperatures": (1.0, 1.0)},
    "L": {"scales": (1.9, 1.9), "temperatures": (1.1, 1.0)},
    "XL": {"scales": (1.75, 1.85), "temperatures": (1.1, 1.0)},
}


class OpenMAGVIT2(Conditioned):
    """``p(t_1, ..., t_N | c) = prod_i p(a_i | c, t_<i) p(b_i | a_i, c, t_<i)``, token ``t = a + 2^bits_0 b``.

    Names and shapes of its weights are those of the released files. To the outside it is a network over 2 N positions: position
    2 i is fed the token t_(i-1) (position 0 the condition) and predicts a_i, position 2 i + 1 is fed a_i and predicts b_i. The
    large blocks run at even positions only.

    Layers that :meth:`perturbed` can weaken: ``"layers.0"``, ``"layers.1"``, ...; the default is the one in the middle.

    Args:
        config: a row of :data:`OPEN_MAGVIT2_SIZES`, or one of your own.

    Raises:
        ValueError: the tokens are no square, or heads do not fit the width.
    """

    config: OpenMAGVIT2Config
    table: Tensor
    prefix = 1

    def __init__(self, config: OpenMAGVIT2Config) -> None:
        super().__init__()
        self.config = c = config
        if c.width % c.heads:
            raise ValueError(f"width={c.width} must be a multiple of heads={c.heads}")
        self.parts = tuple(2**bits for bits in c.bits)
        self.pre_emb, self.post_emb = (nn.Embedding(size, c.width) for size in self.parts)
        self.class_emb = ClassEmbedding(c.num_classes, c.width)
        options = (c.width, c.heads, c.multiple, c.dropout)
        self.spatial_blocks = nn.ModuleList(llama.Block(*options) for _ in range(c.layers))
        self.factorized_blocks = nn.ModuleList(llama.Block(*options) for _ in range(c.part_layers))
        self.norm = llama.RMSNorm(c.width)
        self.head = nn.ModuleList(nn.Linear(c.width, size, bias=False) for size in self.parts)
        self.register_buffer("table", llama.rope_table(c.tokens, c.width // c.heads, 1), persistent=False)
        llama.initialize(self, ("head.0", "head.1"))

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.config.tokens

    @property
    def length(self) -> int:
        """Positions: two for each token."""
        return 2 * self.config.tokens

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the cache it writes to."""
        return self.config.layers + self.config.part_layers, self.config.heads, self.config.width // self.config.heads

    def embed(self, condition: Tensor) -> Tensor:
        """Labels (B,) as embeddings (B, width), which :meth:`forward` takes in their place."""
        out: Tensor = self.class_emb(condition)[:, 0]
        return out

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context, in this thread, the layers of the perturbation are weakened.

        Raises:
            ValueError: a layer this network does not have; when run: queries are to be blurred.
        """
        middle = (f"layers.{len(self.spatial_blocks) // 2}",)
        layers = llama.perturbable(self.spatial_blocks, perturbation.kind)
        return perturb.weakened(perturb.select(layers, perturbation.layers or middle), perturbation)

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor,
        cache: KeyValueCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
    ) -> Logits:
        """Logits after each of the positions ``start .. start + n - 1``; of several positions, -inf fills up the smaller part.

        Args:
            inputs: (B, n): tokens at even positions, first parts at odd ones; at position 0, anything.
            condition: labels (B,) or their embeddings (B, width).
            cache: of all positions before ``start``.
            start: the first position.
            mask: must be None.

        Raises:
            ValueError: a mask is given, or start is not an int: there are no trees over parts of tokens.
        """
        if mask is not None or not isinstance(start, int):
            raise ValueError("mask and start by row are for trees, which this network of tokens in two parts does not have")
        n = inputs.shape[1]
        first = start % 2 if n > 1 else 0  # half a token at the beginning
        whole = (n - first) // 2 * 2
        ends, out, begin = (first, whole, n - first - whole), list[Logits](), 0
        for size in ends:
            if size:
                fed = inputs[:, begin : begin + size]
                out.append((self._pairs if size > 1 else self._one)(fed, condition, cache, start + begin))
                begin += size
        if len(out) == 1:
            return out[0]
        wide = [F.pad(z, (0, self.parts[1] - z.shape[-1]), value=-math.inf) for z, _ in out]
        return Logits(torch.cat(wide, 1), torch.cat([h for _, h in out], 1))

    def _one(self, inputs: Tensor, condition: Tensor, cache: KeyValueCache | None, start: int) -> Logits:
        part = start % 2
        x = self.pre_emb(inputs) if part else self._spatial(inputs, condition, cache, start // 2)
        # A token's parts see only each other: they use the first two places of the cache over and over.
        at = None if cache is None else LayerCache(cache, self.config.layers, part)
        h = self.part_step(x, self.table[part : part + 1], at, None)
        return Logits(self.head[part](h).float(), h)

    def _pairs(self, inputs: Tensor, condition: Tensor, cache: KeyValueCache | None, start: int) -> Logits:
        x = self._spatial(inputs[:, ::2], condition, cache, start // 2)
        pairs = torch.stack([x, self.pre_emb(inputs[:, 1::2])], 2).flatten(0, 1)
        h = self.norm(llama.run(self.factorized_blocks, pairs, self.table[:2], Causal(), None, 0, 0))
        h = h.unflatten(0, (len(inputs), -1))
        a, b = (head(h[:, :, part]).float() for part, head in enumerate(self.head))
        a = F.pad(a, (0, b.shape[-1] - a.shape[-1]), value=-math.inf)
        return Logits(torch.stack([a, b], 2).flatten(1, 2), h.flatten(1, 2))

    def _spatial(self, tokens: Tensor, condition: Tensor, cache: KeyValueCache | None, start: int) -> Tensor:
        n = tokens.shape[1]
        x = self.pre_emb(tokens % self.parts[0]) + self.post_emb(tokens // self.parts[0])
        if start == 0:
            x = torch.cat([self.class_emb(condition), x[:, 1:]], 1)
        x = F.dropout(x, self.config.dropout, self.training)
        at = None if cache is None else LayerCache(cache, 0, start)
        return self.spatial_step(x, self.table[start : start + n], at, llama.causal_mask(start, n))

    def spatial_step(self, x: Tensor, table: Tensor, cache: LayerCache | None, mask: Mask | Tensor | None) -> Tensor:
        """Through the large blocks; ``table`` holds the rows of the rope table for the places of x (B, n, width)."""
        return llama.run(self.spatial_blocks, x, table, mask, *(cache or (None, 0, 0)))

    def part_step(self, x: Tensor, table: Tensor, cache: LayerCache | None, mask: Mask | Tensor | None) -> Tensor:
        """Through the small blocks and the norm."""
        h: Tensor = self.norm(llama.run(self.factorized_blocks, x, table, mask, *(cache or (None, 0, 0))))
        return h

    def regions(self) -> list[Region]:
        """What :func:`genkit.models.compiled.compile_regions` compiles: a step of one token. Several at once run without."""
        return [Region(self, name, "one", INSIDE) for name in ("spatial_step", "part_step")]

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a released file (``.ckpt``, ``.safetensors``) into this network, and put it in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, or its weights do not fit.
        """
        fit(self, read_weights(path, prefix="transformer."), path, what="this Open-MAGVIT2")
        if self.table.is_meta:  # no file has it
            self.table = llama.rope_table(self.config.tokens, self.cache_shape[2], 1).to(self.norm.weight.device)
        return self.eval()
