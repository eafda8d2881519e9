"""The drafter of LANTERN: one Llama layer that predicts the target's next features (EAGLE, Li et al. 2024)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Mask, attention
from genkit.models import llama
from genkit.models.autoregressive import KeyValueCache
from genkit.weights import fit, read_weights


@dataclass(frozen=True)
class EagleConfig:
    """Shape of an :class:`EagleHead`.

    Args:
        width, heads, vocabulary: those of the target.
        hidden: width of the feed-forward layer.
        tokens: of an image, a square.
        prefix: positions of the target's condition (120 for text, 1 for a class).
        eps: of the norm.
    """

    width: int = 1280
    heads: int = 20
    vocabulary: int = 16384
    hidden: int = 3584
    tokens: int = 256
    prefix: int = 120
    eps: float = 1e-6


EAGLE_SIZES = {"llamagen_t2i_XL_stage1_256": EagleConfig(), "llamagen_t2i_XL_stage2_512": EagleConfig(tokens=1024)}


class _Attention(nn.Module):
    attention_backend: str | None = None

    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj = nn.Linear(c.width, c.width, bias=False), nn.Linear(c.width, c.width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(c.width, c.width, bias=False), nn.Linear(c.width, c.width, bias=False)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Mask | Tensor | None, cache: KeyValueCache | None, start: int | Tensor
    ) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = llama.rotate(q, turn).transpose(1, 2), llama.rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        keys, values = (k, v) if cache is None else cache.update(0, k, v, start)
        out = attention(q, keys, values, mask=mask, default=self.attention_backend)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class _FeedForward(nn.Module):
    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(c.width, c.hidden, bias=False), nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(c), _FeedForward(c)
        self.post_attention_layernorm = llama.RMSNorm(c.width, c.eps)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Mask | Tensor | None, cache: KeyValueCache | None, start: int | Tensor
    ) -> Tensor:
        h = x + self.self_attn(x, turn, mask, cache, start)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class EagleHead(nn.Module):
    """``f_{t+1} ~ layer(fc([embedding of token t+1, f_t]))``; the target's own output layer turns features into logits.

    Position t of the drafter holds the target's features of position t and the token that the target is fed at t + 1. Names and
    shapes of its weights are those of LANTERN's released drafter.

    Args:
        config: a row of :data:`EAGLE_SIZES`, or one of your own.

    Raises:
        ValueError: the tokens are no square.
    """

    table: Tensor

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.embed_tokens.weight.requires_grad_(False)  # the target's, frozen
        self.fc = nn.Linear(2 * c.width, c.width)
        self.layers = nn.ModuleList([_Layer(c)])
        self.register_buffer("table", llama.rope_table(c.tokens, c.width // c.heads, c.prefix - 1), persistent=False)

    @property
    def length(self) -> int:
        """Positions."""
        return self.config.prefix - 1 + self.config.tokens

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the cache it writes to."""
        return 1, self.config.heads, self.config.width // self.config.heads

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        start: int | Tensor = 0,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Features (B, n, width) that the target will have one position later.

        Args:
            features: (B, n, width) of positions start .. start + n - 1.
            tokens: (B, n), what the target is fed one position later; 0 within the condition.
            cache, start, mask, positions: as in :meth:`genkit.models.llamagen.LlamaGen.forward`.
        """
        n = tokens.shape[1]
        if positions is None:
            positions = torch.as_tensor(start, device=tokens.device).reshape(-1, 1) + torch.arange(n, device=tokens.device)
        x = self.fc(torch.cat([self.embed_tokens(tokens), features.to(self.fc.weight.dtype)], -1))
        look = llama.causal_mask(start, n, None, mask, x.device)
        out: Tensor = self.layers[0](x, llama.turns(self.table[positions]), look, cache, start)
        return out

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a released drafter into this network, and put it in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, or its weights do not fit.
        """
        fit(self, read_weights(path), path, what=f"{type(self).__name__} of this configuration")
        return self.eval()
