"""The kernels of attention, each with its formula in plain operations, for :mod:`genkit.attention.deviation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.attention.kernels.guidance import guidance_update
from genkit.attention.kernels.modulate import gated_modulate, modulate
from genkit.attention.kernels.qk_norm_rope import qk_norm_rope
from genkit.attention.kernels.sample_logits import sample_logits


@dataclass(frozen=True)
class Kernel:
    """A kernel to measure: ``run`` in some dtype, ``formula`` in float64, both of inputs of these sizes.

    Args:
        sizes: of each input, drawn normal; those in ``waits`` exponential.
        shape: what stands in the table.
    """

    sizes: Mapping[str, tuple[int, ...]]
    run: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    shape: str
    waits: tuple[str, ...] = ()

    def draw(self, source: torch.Generator) -> dict[str, Tensor]:
        """The inputs in float64."""
        found = {}
        for name, size in self.sizes.items():
            x = torch.empty(size, dtype=torch.float64)
            found[name] = x.exponential_(generator=source) if name in self.waits else x.normal_(generator=source)
        return found


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _angles(tokens: int, dim: int) -> Tensor:
    return torch.arange(tokens, dtype=torch.float64)[:, None] * 1e4 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))


def _qk(norm: str) -> Kernel:
    tokens, dim = 64, 64
    angle = _angles(tokens, dim)
    table = torch.stack((angle.cos(), angle.sin()), -1).float()

    def run(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(qk_norm_rope(q, k, table.to(q.device), norm=norm), 1)  # type: ignore[arg-type]

    def formula(q: Tensor, k: Tensor) -> Tensor:
        x = torch.cat((q, k), 1)
        size = x.square().sum(-1, keepdim=True) if norm == "l2" else x.square().mean(-1, keepdim=True) + 1e-6
        return _turned(x / size.sqrt(), angle)

    return Kernel({"q": (2, 4, tokens, dim), "k": (2, 2, tokens, dim)}, run, formula, f"{tokens} x {dim}")


def _update(**options: Any) -> Kernel:
    def run(c: Tensor, u: Tensor, average: Tensor) -> Tensor:
        return guidance_update(c, u, 4.0, average=average, **options)[0]

    def formula(c: Tensor, u: Tensor, average: Tensor) -> Tensor:
        d = c - u + options.get("momentum", 0.0) * average
        size: Tensor = d.square().sum((1, 2, 3), keepdim=True).sqrt()
        d = d * (options.get("threshold", torch.inf) / size).clamp_max(1)
        along = (d * c).sum((1, 2, 3), keepdim=True) / c.square().sum((1, 2, 3), keepdim=True) * c
        guided: Tensor = c + 3.0 * (d - along + options.get("eta", 1.0) * along)
        return guided

    return Kernel(dict.fromkeys(("c", "u", "average"), (4, 4, 32, 32)), run, formula, "4 x 32 x 32")


def _normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _draw(logits: Tensor, uncond: Tensor, waits: Tensor) -> Tensor:
    """ln p - ln e of the token drawn, in float64: less than the largest there is, if another token was drawn."""
    drawn = sample_logits(logits, waits, uncond=uncond, scale=2.0, top_k=100)
    return _race(logits.double(), uncond.double(), waits.double()).gather(-1, drawn[:, None])[:, 0]


def _race(logits: Tensor, uncond: Tensor, waits: Tensor) -> Tensor:
    z = uncond + 2.0 * (logits - uncond)
    kept = z.masked_fill(z < z.topk(100).values[:, -1:], -torch.inf)
    return kept.log_softmax(-1) - waits.log()


_IMAGE = (2, 64, 256)
KERNELS = {
    "qk_norm_rope (l2)": _qk("l2"),
    "qk_norm_rope (rms)": _qk("rms"),
    "guidance_update (CFG)": _update(),
    "guidance_update (APG)": _update(eta=0.0, momentum=-0.5, threshold=40.0),
    "modulate": Kernel(
        {"x": _IMAGE, "scale": (2, 1, 256), "shift": (2, 1, 256)},
        modulate,
        lambda x, scale, shift: _normed(x) * (1 + scale) + shift,
        "64 x 256",
    ),
    "gated_modulate": Kernel(
        {"x": _IMAGE, "branch": _IMAGE, "gate": (2, 1, 256), "scale": (2, 1, 256), "shift": (2, 1, 256)},
        lambda x, branch, gate, scale, shift: gated_modulate(x, branch, gate, scale, shift)[1],
        lambda x, branch, gate, scale, shift: _normed(x + gate * branch) * (1 + scale) + shift,
        "64 x 256",
    ),
    "sample_logits": Kernel(
        {"logits": (64, 4096), "uncond": (64, 4096), "waits": (64, 4096)},
        _draw,
        lambda logits, uncond, waits: _race(logits, uncond, waits).amax(-1),
        "64 x 4096",
        waits=("waits",),
    ),
}
