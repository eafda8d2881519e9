"""LlamaGen: a Llama over the tokens of an image, row by row (Sun et al. 2024, "Autoregressive Model Beats Diffusion")."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Mask
from genkit.guidance.base import Perturbation
from genkit.models import llama, perturb
from genkit.models.autoregressive import Conditioned, KeyValueCache, LayerCache, Logits
from genkit.models.compiled import INSIDE, Region
from genkit.weights import fit, read_weights


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shape of a :class:`LlamaGen`.

    Args:
        layers, heads, width: of the decoder.
        tokens: of an image, a square: (pixels / 16)^2, or (pixels / 8)^2 with VQ-8.
        vocabulary: size of the tokenizer's codebook.
        num_classes: for class labels.
        text_dim: width of text features in place of classes; None for classes.
        text_tokens: how many of them; the released models have 120.
        multiple: the feed-forward width is a multiple of it.
        dropout: share of values dropped in training, at the embedding and behind attention and feed-forward.
    """

    layers: int
    heads: int
    width: int
    tokens: int = 256
    vocabulary: int = 16384
    num_classes: int = 1000
    text_dim: int | None = None
    text_tokens: int = 120
    multiple: int = 256
    dropout: float = 0.1


LLAMAGEN_SIZES = {
    "B": LlamaGenConfig(12, 12, 768),
    "L": LlamaGenConfig(24, 16, 1024),
    "XL": LlamaGenConfig(36, 20, 1280),
    "XXL": LlamaGenConfig(48, 24, 1536),
    "XXXL": LlamaGenConfig(48, 40, 2560),
    "1B": LlamaGenConfig(22, 32, 2048),
    "3B": LlamaGenConfig(24, 32, 3200),
    "7B": LlamaGenConfig(32, 32, 4096),
}
#: The released files: size, side of the image in pixels.
LLAMAGEN_FILES = {
    **{f"c2i_{s}_{p}": replace(LLAMAGEN_SIZES[s], tokens=(p // 16) ** 2) for s in ("B", "L") for p in (256, 384)},
    **{f"c2i_{s}_384": replace(LLAMAGEN_SIZES[s], tokens=576) for s in ("XL", "XXL", "3B")},
    "t2i_XL_stage1_256": replace(LLAMAGEN_SIZES["XL"], tokens=256, text_dim=2048),
    "t2i_XL_stage2_512": replace(LLAMAGEN_SIZES["XL"], tokens=1024, text_dim=2048),
}


class ClassEmbedding(nn.Module):
    """Labels (B,) as one token; the last row of the table is that of no class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        """Embeddings (B, 1, width) of labels, or of what is an embedding already."""
        return (label if label.is_floating_point() else self.embedding_table(label))[:, None]


class CaptionEmbedding(nn.Module):
    """Text features (B, T, text_dim) as T tokens. The features of no text were never trained: they are a buffer."""

    uncond_embedding: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        wide = config.text_dim or 0
        self.register_buffer("uncond_embedding", torch.randn(config.text_tokens, wide) / max(wide, 1) ** 0.5)
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(wide, config.width, bias=False),
                "fc2": nn.Linear(config.width, config.width, bias=False),
            }
        )

    def forward(self, text: Tensor) -> Tensor:
        out: Tensor = self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](text), approximate="tanh"))
        return out


class LlamaGen(Conditioned):
    """``p(t_1, ..., t_N | c) = prod_i p(t_i | c, t_<i)``: the condition's tokens come first, then those of the image.

    Names and shapes of its weights are those of the released files. Position ``prefix + i`` is fed token i and predicts token
    i + 1; the last position of the prefix predicts token 0.

    Layers that :meth:`perturbed` can weaken: ``"layers.0"``, ``"layers.1"``, ...; the default is the one in the middle.

    Args:
        config: a row of :data:`LLAMAGEN_SIZES` or :data:`LLAMAGEN_FILES`, or one of your own.

    Raises:
        ValueError: the tokens are no square, or heads do not fit the width.
    """

    config: LlamaGenConfig
    table: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.width % c.heads:
            raise ValueError(f"width={c.width} must be a multiple of heads={c.heads}")
        self.prefix = 1 if c.text_dim is None else c.text_tokens
        self.parts = (c.vocabulary,)
        self.cls_embedding = ClassEmbedding(c.num_classes, c.width) if c.text_dim is None else CaptionEmbedding(c)
        self.tok_embeddings = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(llama.Block(c.width, c.heads, c.multiple, c.dropout) for _ in range(c.layers))
        self.norm, self.output = llama.RMSNorm(c.width), nn.Linear(c.width, c.vocabulary, bias=False)
        self.register_buffer("table", llama.rope_table(c.tokens, c.width // c.heads, self.prefix), persistent=False)
        llama.initialize(self, ("output",))

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.config.tokens

    @property
    def length(self) -> int:
        """Positions: the condition's and the image's."""
        return self.prefix + self.config.tokens

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the cache it writes to."""
        return self.config.layers, self.config.heads, self.config.width // self.config.heads

    def null(self, batch: int, text_mask: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """The condition that stands for none. With text it takes the mask of the text it stands beside."""
        if isinstance(self.cls_embedding, ClassEmbedding):
            labels: Tensor = super().null(batch)
            return labels
        text = self.cls_embedding.uncond_embedding.expand(batch, -1, -1)
        if text_mask is None:
            text_mask = torch.ones(batch, self.prefix, dtype=torch.bool, device=text.device)
        return {"text": text, "text_mask": text_mask}

    def embed(self, condition: Tensor | Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
        """Labels (B,) as embeddings (B, width), which :meth:`forward` takes in their place. Text features stay."""
        if isinstance(condition, Mapping) or condition.is_floating_point():
            return condition
        out: Tensor = self.cls_embedding(condition)[:, 0]
        return out

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context, in this thread, the layers of the perturbation are weakened.

        Raises:
            ValueError: a layer this network does not have; when run: queries are to be blurred.
        """
        middle = (f"layers.{len(self.layers) // 2}",)
        layers = llama.perturbable(self.layers, perturbation.kind)
        return perturb.weakened(perturb.select(layers, perturbation.layers or middle), perturbation)

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | Mapping[str, Tensor],
        cache: KeyValueCache | None = None,
        start: int | Tensor = 0,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Logits:
        """Logits after each of the positions ``start .. start + n - 1``.

        Args:
            inputs: (B, n) tokens; where the condition stands, anything.
            condition: labels (B,) or their embeddings (B, width); or ``{"text": (B, T, text_dim), "text_mask": (B, T)}``, padded
                on the left, the mask False (or 0) at the padding; without it nothing is padding.
            cache: of all positions before ``start``.
            start: an int, or one per row (B,).
            mask: (n, start + n) or (B, 1, n, max(start) + n), True where a position sees another; padding is hidden all the same.
                Default: causal.
            positions: (n,) or (B, n), where the inputs stand, if not one after the other (in a tree).
        """
        n = inputs.shape[1]
        if positions is None:
            positions = torch.as_tensor(start, device=inputs.device).reshape(-1, 1) + torch.arange(n, device=inputs.device)
            positions = positions[0] if len(positions) == 1 else positions
        tokens = condition["text"] if isinstance(condition, Mapping) else condition
        x = self._embedded(inputs, tokens, positions, start)
        seen = condition.get("text_mask") if isinstance(condition, Mapping) else None
        look = llama.causal_mask(start, n, seen, mask, x.device)
        x = F.dropout(x, self.config.dropout, self.training)
        return self.step(x, self.table[positions], None if cache is None else LayerCache(cache, 0, start), look)

    def step(self, x: Tensor, table: Tensor, cache: LayerCache | None, mask: Mask | Tensor | None) -> Logits:
        """Embeddings (B, n, width) through the blocks to logits; ``table`` holds the rows of the rope table for their places."""
        h = self.norm(llama.run(self.layers, x, table, mask, *(cache or (None, 0, 0))))
        return Logits(self.output(h).float(), h)

    def regions(self) -> list[Region]:
        """What :func:`genkit.models.compiled.compile_regions` compiles: a step of one token. Several at once run without."""
        return [Region(self, "step", "one", INSIDE)]

    def _embedded(self, inputs: Tensor, condition: Tensor, positions: Tensor, start: int | Tensor) -> Tensor:
        x: Tensor = self.tok_embeddings(inputs)
        if isinstance(start, int) and start >= self.prefix:
            return x
        first = self.cls_embedding(condition)
        places = positions.expand(inputs.shape)[..., None]
        prefix = first.gather(1, places.clamp_max(self.prefix - 1).expand(-1, -1, x.shape[-1]))
        return torch.where(places < self.prefix, prefix, x)

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a released file (``.pt``, ``.safetensors``) into this network, and put it in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, or its weights do not fit.
        """
        fit(self, read_weights(path), path, what="this LlamaGen")
        if self.table.is_meta:  # no file has it
            self.table = llama.rope_table(self.config.tokens, self.cache_shape[2], self.prefix).to(self.output.weight.device)
        return self.eval()
