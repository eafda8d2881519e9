"""An exact autoregressive toy whose every prediction can be worked out by hand, with a cache that must be right for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit.guidance.base import Perturbation
from genkit.models.autoregressive import KeyValueCache, Logits

CLASSES, NOTHING = 3, 3  # the label NOTHING stands for "no class"


class Sums(nn.Module):
    """Tokens 0 .. V-1 behind one position for the class c. ``z_i = S_i M + E[c]``, S_i the decayed sum of the tokens i sees.

    ``S_i = sum_j (0.9 + c / 30)^(p_i - p_j) (1 + c) onehot_j``. A position stores the one-hot vector, times 1 + c, as its value
    and its place p_j as its key: logits depend on all earlier tokens, on their places, and on the class for which they were
    stored, so the cache of another branch, or one with a gap, gives other logits. Float64, no randomness.
    """

    def __init__(self, vocabulary: int = 7, tokens: int = 12, seed: int = 0, sharpness: float = 1.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length, self.num_classes = vocabulary, tokens + 1, CLASSES
        self.cache_shape = (1, 1, vocabulary)
        self.matrix = nn.Parameter(sharpness * torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64))
        self.classes = nn.Parameter(torch.randn(CLASSES + 1, vocabulary, generator=g, dtype=torch.float64))
        self.requires_grad_(False)
        self.calls: list[tuple[int, int, list[int]]] = []  # start, positions, labels of every call
        self.weak = 1.0

    def forward(
        self,
        inputs: Tensor,
        condition: Any,
        cache: KeyValueCache | None = None,
        start: int | Tensor = 0,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Logits:
        label = condition if not condition.is_floating_point() else condition.argmax(1)
        b, n = inputs.shape
        starts = torch.as_tensor(start).expand(b)
        self.calls.append((int(starts.max()), n, label.tolist()))
        slots = starts[:, None] + torch.arange(n)
        places = slots if positions is None else positions.expand(b, n)
        one = nn.functional.one_hot(inputs, self.vocabulary).double() * (places > 0)[..., None] * (1 + label)[:, None, None]
        key = places.double()[..., None].expand(b, n, self.vocabulary)
        keys, values = key[:, None], one[:, None]
        if cache is not None:
            keys, values = cache.update(0, keys.contiguous(), values, start)  # type: ignore[arg-type]
        seen = slots[:, :, None] >= torch.arange(keys.shape[2]) if mask is None else mask.reshape(-1, n, mask.shape[-1])
        decay = (0.9 + 0.1 * label / CLASSES)[:, None, None] ** (places[:, :, None] - keys[:, 0, :, 0][:, None]).clamp_min(0)
        hidden = (decay * seen) @ values[:, 0]
        return Logits(self.weak * hidden @ self.matrix + self.classes[label][:, None], hidden)

    def embed(self, condition: Tensor) -> Tensor:
        return condition if condition.is_floating_point() else nn.functional.one_hot(condition, CLASSES + 1).double()

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        """Weaker dependence on what was seen, how much depends on the kind."""
        self.weak = {"identity": 0.3, "blur": 0.6, "skip": 0.1}[perturbation.kind]
        try:
            yield
        finally:
            self.weak = 1.0

    def full(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Logits (B, n + 1, V) after the class and after each of the tokens (B, n), without a cache."""
        return self(nn.functional.pad(tokens, (1, 0)), label).logits


LABELS = torch.tensor([0, 1, 2, 0])


def conditions(label: Tensor) -> dict[str, Tensor]:
    """What a guidance may ask for: the class, no class, and another class."""
    return {"cond": label, "uncond": torch.full_like(label, NOTHING), "negative": (label + 1) % CLASSES}
