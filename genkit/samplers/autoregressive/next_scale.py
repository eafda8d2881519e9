"""Images scale by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.guidance.base import Guidance
from genkit.guidance.cfg import CFG
from genkit.guidance.scheduled import Scheduled
from genkit.random import generator
from genkit.samplers.autoregressive.filters import STREAM, Filters, Race
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.tokenizers.multiscale import MultiScale

Callback = Callable[[int, Tensor, Tensor], None]
"""``callback(scale, indices, f_hat)`` after each scale: the tokens (B, L') so far and the latent (B, C, P, P) they make.
``tokenizer.decode_features(f_hat)`` is the image as it stands."""


class Drawn(NamedTuple):
    """Tokens (B, L) of all scales, and the latent (B, C, P, P) for the decoder (not that of the tokens if drawn smooth)."""

    indices: Tensor
    f_hat: Tensor


def var_guidance(cfg: float) -> Guidance:
    """VAR's guidance: ``w_k = 1 + cfg k / (K - 1)`` at scale k of K. Its cfg = 0 is no guidance, and the first scale has none."""
    return Scheduled(CFG(1 + cfg), "linear", preserve_mean=False)


#: Of the paper's results: ``var_guidance(1.5)`` with these.
VAR_FILTERS = Filters(top_k=900, top_p=0.96, order="var")


def known_tokens(known: Tensor, patch_nums: tuple[int, ...], least: float = 1.0) -> Tensor:
    """Which tokens of each scale lie in the known part of an image: (B, L), for ``indices.where(known_tokens(...), -1)``.

    Args:
        known: (B, H, W), True where pixels are to stay.
        patch_nums: sides of the scales.
        least: the share of a token's cell that must be known, above 0 and up to 1.

    Raises:
        ValueError: least is not in its range.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least={least}: give a share above 0 and up to 1")
    image = known.double()[:, None]
    shares = [F.interpolate(image, size=(p, p), mode="area").flatten(1) for p in patch_nums]
    return torch.cat(shares, 1) >= least - 1e-9


@torch.no_grad()
def next_scale(
    guided: GuidedLogits,
    quantizer: MultiScale,
    seeds: Sequence[int],
    filters: Filters = VAR_FILTERS,
    *,
    smooth: bool = False,
    given: Tensor | None = None,
    callback: Callback | None = None,
) -> Drawn:
    """Draw images with a network such as :class:`genkit.models.var.VAR` (Tian et al. 2024, sec. 3.2).

    The tokens of one scale are drawn at once, each on its own, given all scales before.

    Args:
        guided: a new run over the batch; it is at its end afterwards.
        quantizer: of the tokenizer, with the network's scales.
        seeds: one integer per sample. The result for a sample depends on its own seed and condition alone.
        filters: what the draws are restricted to.
        smooth: in place of codes, mixtures of codes by Gumbel-softmax weights, which sharpen from scale to scale: VAR's
            more_smooth. Nicer to look at; not for measurements.
        given: (B, L) tokens that are to stand where they are, -1 where one is to be drawn. See :func:`known_tokens`.
        callback: see :data:`Callback`; for images while they are made.

    Raises:
        ValueError: the quantizer has other scales or codes than the network, a wrong number of seeds, or ``given`` of a wrong
            shape or with tokens that do not exist.
    """
    network: Any = guided.model("main")
    sides, race = network.config.patch_nums, Race(seeds)
    _check(network, quantizer, guided.batch, given)
    like: Tensor = next(network.parameters())
    inputs = like.new_zeros(guided.batch, sides[0] ** 2, quantizer.dim)
    indices = torch.empty(guided.batch, 0, dtype=torch.long, device=like.device)
    f_hat = None
    for k in range(len(sides)):
        logits = guided.logits(inputs, k, len(sides))
        tokens = race.draw(logits, filters, k)
        fixed = None if given is None else given.to(tokens)[:, indices.shape[1] : indices.shape[1] + tokens.shape[1]]
        if fixed is not None:
            tokens = torch.where(fixed < 0, tokens, fixed)
        codes = quantizer.codes(tokens)
        if smooth:
            ratio = k / (len(sides) - 1) if len(sides) > 1 else 0.0
            mixed = mixture(filters(logits), _waits(seeds, logits, k), ratio).to(codes.dtype) @ quantizer.table()
            codes = mixed if fixed is None else torch.where((fixed < 0)[..., None], mixed, codes)
        indices = torch.cat((indices, tokens), 1)
        f_hat, following = quantizer.step(f_hat, codes, k)
        if callback is not None:
            callback(k, indices, f_hat)
        if following is not None:
            inputs = following.to(like.dtype)
    assert f_hat is not None  # there is at least one scale
    return Drawn(indices, f_hat)


def mixture(logits: Tensor, waits: Tensor, ratio: float) -> Tensor:
    """Weights of codes: ``softmax(((1 + r) logits - ln e) / tau)``, ``e ~ Exp(1)``, ``tau = max(0.27 (1 - 0.95 r), 0.005)``."""
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return (((1 + ratio) * logits - waits.log()) / tau).softmax(-1)


def _waits(seeds: Sequence[int], like: Tensor, scale: int) -> Tensor:
    """Exp(1) numbers, row b from ``seeds[b]`` and the scale alone, apart from those with which tokens are drawn."""
    rows = [torch.empty(like.shape[1:]).exponential_(generator=generator(seed, STREAM, scale, 1)) for seed in seeds]
    return torch.stack(rows).to(like)


def _check(network: Any, quantizer: MultiScale, batch: int, given: Tensor | None) -> None:
    config = network.config
    if quantizer.patch_nums != tuple(config.patch_nums) or quantizer.size != config.vocabulary:
        raise ValueError(
            f"quantizer has the scales {quantizer.patch_nums} and {quantizer.size} codes, but the network "
            f"{tuple(config.patch_nums)} and {config.vocabulary}: take the tokenizer it was trained with"
        )
    if given is None:
        return
    shape, size = (batch, quantizer.length), quantizer.size
    if given.shape != shape or given.is_floating_point() or not bool(((given >= -1) & (given < size)).all()):
        raise ValueError(
            f"given of shape {tuple(given.shape)} must be integers of shape {shape}, from 0 to {size - 1}, "
            "or -1 where one is drawn"
        )
