"""The decoder blocks that LlamaGen, Open-MAGVIT2 and their drafters are made of: RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Causal, Mask
from genkit.attention.kernels import qk_norm_rope, usable
from genkit.models import perturb
from genkit.models.autoregressive import KeyValueCache, LayerCache
from genkit.models.compiled import attend


def rope_table(tokens: int, head_dim: int, prefix: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine (prefix + tokens, head_dim / 2, 2) of a square grid: half the pairs turn by the row, half by the column.

    The rows of the prefix are zero, as in the released models: queries and keys of the condition become zero, so that all of
    the prefix is looked at alike.

    Raises:
        ValueError: tokens are no square, or head_dim is no multiple of 4.
    """
    side = round(tokens**0.5)
    if side * side != tokens or head_dim % 4:
        raise ValueError(f"tokens={tokens} must be a square, and the width of a head, {head_dim}, a multiple of 4")
    speed = base ** -(torch.arange(0, head_dim // 2, 2)[: head_dim // 4].float() / (head_dim // 2))
    angle = torch.arange(side)[:, None] * speed
    grid = torch.cat([angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)], -1).flatten(0, 1)
    return F.pad(torch.stack([grid.cos(), grid.sin()], -1), (0, 0, 0, 0, prefix, 0))


def turns(table: Tensor) -> Tensor:
    """The rows (..., n, d / 2, 2) of a :func:`rope_table` as complex numbers (..., n, 1, d / 2), the same for all heads.

    In what is compiled as real ones, (..., n, 1, d / 2, 2): complex ones are not fused.
    """
    return table.unsqueeze(-3) if torch.compiler.is_compiling() else torch.view_as_complex(table).unsqueeze(-2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (..., n, heads, d) by the angles of ``turn``, see :func:`turns`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)


def causal_mask(
    start: int | Tensor, n: int, seen: Tensor | None = None, mask: Tensor | None = None, device: torch.device | None = None
) -> Mask | Tensor | None:
    """What positions start .. start + n - 1 see, a tensor if it depends on the row: (B, 1, n, end). None: all keys to the end.

    Args:
        start: an int, or one per row (B,).
        seen: (B, m) bool, which of the first m positions may be seen, by others than themselves; m may exceed the end.
        mask: a mask to use in place of the causal one, (n, end) or (B, 1, n, end).
        device: of a tensor that is returned.
    """
    if mask is None and seen is None and isinstance(start, int):
        return None if n == 1 else Causal()
    starts = torch.as_tensor(start).reshape(-1, 1)
    mask, seen = (t if t is None else t.to(device) for t in (mask, seen))
    slots = starts.to(device) + torch.arange(n, device=device)
    end = int(starts.max()) + n
    keys = torch.arange(end, device=device)
    look = keys <= slots[..., None] if mask is None else mask.reshape(-1, n, end)
    if seen is not None:
        visible = F.pad(seen.bool(), (0, max(end - seen.shape[1], 0)), value=True)[:, None, :end]
        look = (look & visible) | (keys == slots[..., None])
    return look[:, None]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) weight``, the quotient in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        # This way it takes the least time where there are few positions.
        square: Tensor = torch.linalg.vector_norm(f, dim=-1, keepdim=True).square()
        scale = square.mul_(1 / f.shape[-1]).add_(self.eps).rsqrt_()
        return (f * scale).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)``, of width 8/3 of the input's, rounded up to a multiple."""

    def __init__(self, width: int, multiple: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-int(8 * width / 3) // multiple) * multiple
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2, self.dropout = nn.Linear(hidden, width, bias=False), dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Rotary self-attention over what the cache holds and these positions."""

    attention_backend: str | None = None

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask | Tensor | None, update: LayerCache | None = None) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, -1))
        if usable(qkv):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = qk_norm_rope(q, k, torch.view_as_real(turn).squeeze(-3))
        else:
            q, k = rotate(qkv[..., :2, :, :].flatten(2, 3), turn).chunk(2, 2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), qkv[..., 2, :, :].transpose(1, 2)
        perturbation = perturb.active(self)
        if perturbation is not None and perturbation.kind == "blur":
            raise ValueError("a network that sees one token at a time cannot blur its queries over the image; use PAG or SLG")
        if perturbation is not None and perturbation.kind == "identity":
            out = v
            if update is not None:
                update(k, v)
        else:
            out = attend(q, k, v, update, mask, default=self.attention_backend)
        return F.dropout(self.wo(out.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    """``h = x + attention(norm(x))``, ``h + feed_forward(norm(h))``."""

    def __init__(self, width: int, heads: int, multiple: int = 256, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, multiple, dropout)
        self.attention_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask | Tensor | None, update: LayerCache | None = None) -> Tensor:
        perturbation = perturb.active(self)
        if perturbation is not None and perturbation.kind == "skip":
            return x
        h = x + self.attention(self.attention_norm(x), turn, mask, update)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


def run(
    blocks: nn.ModuleList,
    x: Tensor,
    table: Tensor,
    mask: Mask | Tensor | None,
    cache: KeyValueCache | None,
    layer: int,
    start: int | Tensor,
) -> Tensor:
    """x through the blocks; ``table`` holds the rows of a :func:`rope_table` for its places.

    Keys and values go to layers ``layer``, ``layer + 1``, ... of the cache, from ``start`` on.
    """
    turn = turns(table)
    for i, block in enumerate(blocks, layer):
        x = block(x, turn, mask, None if cache is None else LayerCache(cache, i, start))
    return x


def perturbable(blocks: nn.ModuleList, kind: str, name: str = "layers") -> Mapping[str, nn.Module]:
    """The modules that can be weakened, by name: whole blocks to skip, else their attention."""
    return {f"{name}.{i}": block if kind == "skip" else block.attention for i, block in enumerate(blocks)}  # type: ignore[misc]


def initialize(module: nn.Module, heads: tuple[str, ...]) -> None:
    """Draw new weights: normal of standard deviation 0.02, zero for the heads, as LlamaGen's training does."""
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.zeros_(part.weight) if name in heads else nn.init.normal_(part.weight, std=0.02)
