"""Images token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from genkit.samplers.autoregressive.filters import Filters, Race
from genkit.samplers.autoregressive.guided import GuidedLogits

Callback = Callable[[int, Tensor], None]
"""``callback(i, tokens)`` after token i: tokens (B, N), -1 where there is none yet. To show a part of an image, decode
``tokens.clamp_min(0)``."""


@torch.no_grad()
def generate(
    guided: GuidedLogits,
    seeds: Sequence[int],
    filters: Filters | Sequence[Filters] = Filters(),  # noqa: B008 (immutable)
    *,
    scales: Sequence[float] | None = None,
    given: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Tokens (B, N) of a network such as :class:`genkit.models.llamagen.LlamaGen`, one after the other on a static cache.

    A network with several ``parts`` (Open-MAGVIT2) predicts each token in as many sub-tokens, one after the other, lowest first;
    the token is ``part_0 + size_0 part_1 + ...``, which is how its tokenizer numbers its codes. All of them are step i of N for
    the guidance.

    Args:
        guided: a new run over the batch; it is at its end afterwards.
        seeds: one integer per sample. The result for a sample depends on its own seed and condition alone.
        filters: one for all sub-tokens, or one for each.
        scales: guidance scales w, one for each sub-token, in place of the guidance's own.
        given: (B, N) tokens that are to stand where they are, -1 where one is to be drawn.
        callback: called after every token.

    Raises:
        ValueError: a wrong number of seeds, filters or scales, or given of a wrong shape or with tokens that do not exist.
    """
    network: Any = guided.model("main")
    sizes: tuple[int, ...] = network.parts
    kinds = [filters] * len(sizes) if isinstance(filters, Filters) else list(filters)
    weights = [None] * len(sizes) if scales is None else list(scales)
    for name, value in (("filters", kinds), ("scales", weights)):
        if len(value) != len(sizes):
            raise ValueError(f"{name} has {len(value)} entries, but a token of this network has {len(sizes)} sub-tokens")
    fixed, race = _fixed(guided, given, sizes), Race(seeds)
    fed = torch.zeros(guided.batch, network.prefix, dtype=torch.long, device=fixed.device)
    tokens = torch.full_like(fixed, -1)
    for i in range(network.tokens):
        token, base = fed.new_zeros(guided.batch, 1), 1
        for j, size in enumerate(sizes):
            logits = guided.logits(fed, i, network.tokens, tail=1, weight=weights[j])
            drawn = race.draw(logits[..., :size], kinds[j], i, j)
            own = fixed[:, i : i + 1]
            token = token + base * torch.where(own < 0, drawn, own // base % size)
            fed, base = token, base * size
        tokens[:, i : i + 1] = token
        if callback is not None:
            callback(i, tokens)
    return tokens


def _fixed(guided: GuidedLogits, given: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    network: Any = guided.model("main")
    device = cast(Tensor, next(network.parameters())).device
    shape, count = (guided.batch, network.tokens), int(torch.tensor(sizes).prod())
    if given is None:
        return torch.full(shape, -1, device=device)
    if given.shape != shape or given.is_floating_point() or not bool(((given >= -1) & (given < count)).all()):
        raise ValueError(
            f"given of shape {tuple(given.shape)} must be integers of shape {shape}, from 0 to {count - 1}, "
            "or -1 where one is to be drawn"
        )
    return given.long().to(device)
