"""The blocks of VAR: AdaLN, cosine attention, MLP."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import Mask
from genkit.attention.kernels import gated_modulate, modulate, qk_norm_rope, usable
from genkit.models import perturb
from genkit.models.autoregressive import LayerCache, wide
from genkit.models.compiled import attend


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulated(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) gain + shift``."""
    return modulate(x, gain, shift, offset=0) if usable(x, gain, shift) else torch.addcmul(shift, layer_norm(x), gain)


def last(layers: nn.Sequential) -> nn.Linear:
    """The linear layer at its end."""
    return cast(nn.Linear, layers[-1])


class Attention(nn.Module):
    """Self-attention over this block of positions and all before it.

    With ``l2_norm``: ``softmax(exp(min(g, ln 100)) cos(q, k)) v``, g learned for each head. Without, the scale of ``q . k`` is
    0.25 / sqrt(head_dim).
    """

    attention_backend: str | None = None
    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // heads)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))

    def forward(self, x: Tensor, sides: tuple[int, ...], cache: LayerCache | None, mask: Mask | Tensor | None) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        perturbation = perturb.active(self)
        if perturbation is not None and perturbation.kind == "identity":
            out = v
        else:
            if hasattr(self, "scale_mul_1H11"):
                gain = self.scale_mul_1H11.clamp(max=math.log(100)).exp()
                if usable(qkv, gain):
                    q, k = qk_norm_rope(q, k, norm="l2", q_weight=gain.reshape(-1, 1))
                else:
                    q, k = F.normalize(qkv[..., :2, :, :], dim=-1).permute(2, 0, 3, 1, 4)
                    q = q * gain.to(q.dtype)
            if perturbation is not None:
                scales = zip(q.split([p * p for p in sides], 2), sides, strict=True)
                q = torch.cat([perturb.blur_queries(part, p, p, perturbation.sigma) for part, p in scales], 2)
            out = attend(q, k, v, cache, mask, self.scale, self.attention_backend)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """``W2 gelu(W1 x)``, with the tanh form of GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """``x + gamma f(norm(x) (1 + scale) + shift)``, f attention and then the MLP; the six come from the condition (AdaLN)."""

    def __init__(self, width: int, heads: int, *, l2_norm: bool, shared_adaln: bool) -> None:
        super().__init__()
        self.width = width
        self.attn = Attention(width, heads, l2_norm)
        self.ffn = FeedForward(width)
        if shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def reset_parameters(self, depth: int) -> None:
        """Shrink freshly drawn weights: residual branches by sqrt(2 depth), and what AdaLN adds (0.5; gains 1e-5)."""
        for linear in (self.attn.proj, self.ffn.fc2):
            linear.weight.div_(math.sqrt(2 * depth))
        gains = self.ada_gss[0, 0] if hasattr(self, "ada_gss") else last(self.ada_lin).weight.unflatten(0, (6, self.width))
        gains[:2].mul_(1e-5)
        gains[2:].mul_(0.5)

    def modulation(self, embedded: Tensor, shared: Tensor | None) -> Tensor:
        """gamma1, gamma2, scale1 + 1, scale2 + 1, shift1, shift2 (B, 6, C), from the shared AdaLN's (B, 6, C) if there is one."""
        if shared is not None:
            six: Tensor = shared + self.ada_gss[0]
        else:
            six = self.ada_lin(embedded).view(-1, 6, self.width)
        return six + six.new_tensor([0, 0, 1, 1, 0, 0])[:, None]

    def forward(
        self, x: Tensor, modulation: Tensor, sides: tuple[int, ...], cache: LayerCache | None, mask: Mask | Tensor | None
    ) -> Tensor:
        if perturb.active(self):
            return x
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:, :, None].unbind(1)
        looked = self.attn(modulated(x, scale1, shift1), sides, cache, mask)
        if usable(x, looked, modulation):
            x, h = gated_modulate(x, looked, gamma1, scale2, shift2, offset=0)
        else:
            x = torch.addcmul(x, gamma1, looked)
            h = modulated(x, scale2, shift2)
        return torch.addcmul(x, gamma2, self.ffn(h))


class Modulation(nn.Module):
    """``norm(x) (1 + scale) + shift``, both from the condition: what stands before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``modulation``: (B, 2 C), what ``ada_lin`` makes of the condition."""
        scale, shift = wide(modulation[:, None]).chunk(2, -1)
        return torch.addcmul(shift, layer_norm(wide(x)), 1 + scale)
