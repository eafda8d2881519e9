"""From logits to a token: temperature, top-k, top-p, and the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.attention.kernels import sample_logits, usable
from genkit.guidance.base import check_count, check_number
from genkit.random import check_seeds, generator

STREAM = 3  # of a sample's seed; 0 to 2 are the noise of diffusion


@dataclass(frozen=True)
class Filters:
    """``softmax(keep(logits / temperature))``, out of place.

    top_k keeps the k largest logits, and all that equal the k-th. top_p keeps the fewest tokens that together have probability p.
    The orders differ in which comes first, and in the token at the edge of top_p:

    - ``"llamagen"``: top_k, then top_p among those left; the token with which the sum of the larger ones passes p is the last.
    - ``"var"``: the same, but the sum of the smaller ones decides: those go for which it is at most 1 - p, itself included.
    - ``"transformers"``: top_p as ``"var"``, then top_k.

    Args:
        temperature: above 0; 0 leaves only the largest logit. Default 1.
        top_k: from 1; 0 (default) turns it off, and so does one beyond the vocabulary.
        top_p: from 0 to 1; 1 (default) and 0 turn it off.
        order: one of the three above.

    Raises:
        ValueError: an argument outside its range, or an unknown order.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    order: Literal["llamagen", "var", "transformers"] = "llamagen"

    def __post_init__(self) -> None:
        check_number(self, "temperature", 0.0, 1e6)
        check_count(self, "top_k", 0)
        check_number(self, "top_p", 0.0, 1.0)
        if self.order not in ("llamagen", "var", "transformers"):
            raise ValueError(f"Filters: order={self.order!r} must be 'llamagen', 'var' or 'transformers'")

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (..., V) divided by the temperature, -inf where a token is left out."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
        logits = logits if self.temperature == 1 else logits / self.temperature
        if self.order == "transformers":
            return self._top_k(self._top_p(logits))
        if not 0 < self.top_k < logits.shape[-1]:
            return self._top_p(logits)
        if self.top_p in (0.0, 1.0):
            return self._top_k(logits)
        values, place = logits.topk(self.top_k, dim=-1)
        if bool(((logits >= values[..., -1:]).sum(-1) != self.top_k).any()):  # others equal the k-th
            return self._top_p(self._top_k(logits))
        kept = values.masked_fill(self._beyond(values), -math.inf)
        return torch.full_like(logits, -math.inf).scatter(-1, place, kept)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (..., V) of the tokens that are left."""
        return self(logits).softmax(-1)

    def _top_k(self, logits: Tensor) -> Tensor:
        if not 0 < self.top_k < logits.shape[-1]:
            return logits
        least = logits.topk(self.top_k, dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, -math.inf)

    def _top_p(self, logits: Tensor) -> Tensor:
        if self.top_p in (0.0, 1.0):
            return logits
        ordered, place = logits.sort(dim=-1, descending=True)
        cut = self._beyond(ordered)
        return logits.masked_fill(torch.zeros_like(cut).scatter(-1, place, cut), -math.inf)

    def _beyond(self, ordered: Tensor) -> Tensor:
        """What top_p leaves out of falling logits."""
        if self.order == "llamagen":
            # Those before it already pass p. (A sum less its last term would differ in the last bit.)
            return torch.nn.functional.pad(ordered.softmax(-1).cumsum(-1)[..., :-1] > self.top_p, (1, 0))
        cut = (ordered.flip(-1).softmax(-1).cumsum(-1) <= 1 - self.top_p).flip(-1)
        cut[..., 0] = False
        return cut


class Race:
    """Draws tokens by an exponential race, ``argmax_t p_t / e_t`` with ``e_t ~ Exp(1)``, so that t wins with probability p_t.

    Row b is a function of its probabilities, ``seeds[b]`` and the key alone, and the numbers are drawn on the CPU in float32: the
    same on every device, in every batch, and after every break.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = check_seeds(seeds)

    def __call__(self, probabilities: Tensor, *key: int) -> Tensor:
        """Tokens (B, ...) from probabilities (B, ..., V). The key tells the draws of a run apart, such as the step's number.

        Raises:
            ValueError: another number of rows than of seeds.
        """
        self._check(probabilities)
        return (probabilities / self._waits(probabilities, *key)).argmax(-1)

    def draw(self, logits: Tensor, filters: Filters, *key: int) -> Tensor:
        """Tokens (B, ...) from logits (B, ..., V); at temperature 0 no numbers are drawn. Raises as a call does."""
        self._check(logits)
        f = filters
        if f.temperature == 0:
            return logits.argmax(-1)
        if usable(logits):
            options: dict[str, Any] = {"temperature": f.temperature, "top_k": f.top_k, "top_p": f.top_p, "order": f.order}
            return sample_logits(logits, self._waits(logits, *key), **options)
        return self(f.probabilities(logits), *key)

    def _waits(self, like: Tensor, *key: int) -> Tensor:
        rows = [torch.empty(like.shape[1:]).exponential_(generator=generator(seed, STREAM, *key)) for seed in self.seeds]
        return torch.stack(rows).to(like)

    def _check(self, rows: Tensor) -> None:
        if len(rows) != len(self.seeds):
            raise ValueError(f"{len(rows)} rows were asked of {len(self.seeds)} seeds: give one seed per sample")
