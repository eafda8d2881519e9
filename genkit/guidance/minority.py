"""Minority guidance: towards images that are rare in the data, by a classifier of rarity or by the denoiser's own errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import COND, Host, Need, StepInfo, check_count, check_number
from genkit.guidance.classifier import _Scored, class_gradient, gradient
from genkit.guidance.conditions import step_noise
from genkit.guidance.levels import noise_level
from genkit.noise import VP

Distance = Callable[[Tensor, Tensor], Tensor]
"""``distance(a, b)`` (B,) between two batches of images; differentiable where it guides."""


def l2(a: Tensor, b: Tensor) -> Tensor:
    """``|a - b|`` per sample (B,), over all axes."""
    norm: Tensor = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return norm


def minority_score(
    denoiser: Any,
    images: Tensor,
    condition: Any,
    sigma: float,
    noise: Callable[[Tensor, int], Tensor],
    draws: int = 5,
    distance: Distance = l2,
) -> Tensor:
    """How badly a denoiser restores each image from noise: ``mean_k distance(x0, D(x0 + sigma n_k; sigma))`` (B,).

    Large for images unlike most of the data (Um et al. 2024, whose distance is LPIPS and whose sigma is 6.4: step 60 of 100 of
    the linear VP schedule).

    Args:
        denoiser: ``denoiser(x, sigma, condition) -> D`` with a ``path``.
        images: (B, ...) clean images, in the denoiser's units.
        condition: one for the whole batch, as the denoiser takes it.
        sigma: noise level, positive and finite.
        noise: ``noise(like, draw)``, unit Gaussian noise of the shape of ``like``.
        draws: how many noises are averaged over.
        distance: between the images and their restorations.
    """
    alpha, s = denoiser.path(sigma)
    levels = torch.full((len(images),), sigma, dtype=torch.float64, device=images.device)
    each = [
        distance(images, denoiser(alpha * images + s * noise(images, k), levels, condition)).reshape(len(images))
        for k in range(draws)
    ]
    return torch.stack(each).mean(0)


def minority_levels(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Labels 0 .. count - 1 of ``scores`` (N,), and the quantiles q_1 .. q_count: label j means ``q_j < score <= q_{j+1}``."""
    share = torch.arange(1, count + 1, dtype=torch.float64) / count
    quantiles = torch.quantile(scores.double(), share.to(scores.device))
    return torch.bucketize(scores.double(), quantiles[:-1]), quantiles


def unit_peak(direction: Tensor) -> Tensor:
    """``g / max|g|``, per sample over all axes; 0 stays 0."""
    peak = direction.abs().flatten(1).amax(1).clamp_min(torch.finfo(direction.dtype).tiny)
    return direction / peak.reshape(-1, *[1] * (direction.ndim - 1))


@dataclass(frozen=True)
class MinorityGuidance(_Scored):
    """``score = (w - 1) grad_x log p(level | x)``: towards images of one level of rarity (Um et al. 2024).

    Classifier guidance with a classifier of minority levels: quantile bins of :func:`minority_score` over the data. The authors'
    classifier scale is ``w - 1`` (3.5 on LSUN), and their level the last of 100. Costs as :class:`ClassifierGuidance`.

    Args:
        scale: w, 1 means no guidance (the classifier is then not evaluated).
        level: which bin, from 0, the most common images. Negative ones count from the end, -1 being the rarest; the classifier
            must then say how many there are (``classifier.levels``).
        model: name of the classifier among the run's models: ``classifier(x, sigma, level) -> log p(level | x)`` (B,).

    Raises:
        ValueError: scale is not a finite number, or level not an integer; in a run, no such model or level.
    """

    level: int = -1
    model: str = "minority"
    examples: ClassVar[tuple[str, ...]] = ("MinorityGuidance(3.0, level=2)", "MinorityGuidance(1.5, 0)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "level", -(10**6))

    def ascent(self, info: StepInfo, run: Host) -> Tensor:
        classifier, level = run.model(self.model), self.level
        count: int | None = getattr(classifier, "levels", None)
        if count is None and level < 0:
            raise ValueError(f"{self!r}: the model {self.model!r} does not say how many levels it has; give one from 0 on")
        if count is not None and not -count <= level < count:
            raise ValueError(f"{self!r}: the model {self.model!r} has {count} levels; use -{count} to {count - 1}")
        label = torch.full((len(info.x),), level if count is None else level % count, device=info.x.device)
        return class_gradient(classifier, info, label)


@dataclass(frozen=True)
class SelfMinority(_Scored):
    """``score = (w - 1) g / max|g|``, ``g = grad_x d(x0, x0')``: away from what the denoiser expects (Um & Ye 2024).

    ``x0 = D(x)``, ``x0' = stop_gradient(D(x0 + at n; at))``: a rare image is one that the denoiser would not make again.
    ``max|g|`` is per sample, in the coordinates of the VP path. Active evaluations cost ``1 + draws`` further rows and one
    backward pass through the denoiser. To a caller who differentiates, x0' is a constant, and so is g where x requires no
    gradient.

    Args:
        scale: w, 1 means no guidance (nothing further is then evaluated). The authors' is ``w - 1`` (0.4; 0.2 on ImageNet 64).
        at: sigma of the second look, positive and finite; 25 is t / T = 0.8 of the linear VP schedule.
        every: only in every so many-th step, counted from the last step backwards; 1 is every step.
        until: only in steps that begin above this sigma; 0 is all of them.
        draws: noises averaged over, at least 1.
        distance: ``"l2"``, the norm over all values, or the name of a model ``distance(a, b) -> (B,)`` of the run, LPIPS for
            example (which is the authors'). To l2 strong contrast is rare: images saturate at the authors' scale, use 1.1.
        normalized: False takes g as it is, without dividing it by its largest value.

    Raises:
        ValueError: an argument outside its range; in a run, no model of the name of ``distance``, or steps without noise level.
    """

    at: float = 25.0
    every: int = 5
    until: float = 0.0
    draws: int = 1
    distance: str = "l2"
    normalized: bool = True
    requires: ClassVar[frozenset[Need]] = frozenset({"refine", "gradient", "noise"})
    examples: ClassVar[tuple[str, ...]] = (
        "SelfMinority(1.4, at=2.0)",
        "SelfMinority(1.2, at=1.5, every=1, until=0.2, draws=2)",
        "SelfMinority(1.5, at=2.0, every=2, normalized=False)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "at", 0.0, 1e9, inside=True)
        check_number(self, "until", 0.0, math.inf)
        for name in ("every", "draws"):
            check_count(self, name, 1)
        if not isinstance(self.distance, str) or not isinstance(self.normalized, bool):
            raise ValueError(f"{self!r}: distance must be 'l2' or the name of a model, and normalized True or False")

    def weight(self, info: StepInfo) -> float:
        sigma = noise_level(info, "SelfMinority: at is a noise level", "it with a diffusion model")
        active = sigma > self.until and (info.total - 1 - info.index) % self.every == 0
        return super().weight(info) if active else 1.0

    def ascent(self, info: StepInfo, run: Host) -> Tensor:
        measure = l2 if self.distance == "l2" else run.model(self.distance)

        def surprise(x: Tensor) -> Tensor:
            clean = run.evaluate(info._replace(x=x), (COND,))["cond"]
            again = [self.second_look(info, clean.detach(), run, k) for k in range(self.draws)]
            return torch.stack([measure(clean, other).reshape(len(x)) for other in again]).mean(0)

        g = gradient(surprise, info.x)
        return unit_peak(g) * (VP(info.s / info.alpha)[0] / info.alpha) if self.normalized else g

    @torch.no_grad()  # it is held fixed by definition
    def second_look(self, info: StepInfo, clean: Tensor, run: Host, draw: int) -> Tensor:
        """``D(clean + at n; at)``, with the noise of this draw."""
        noisy = clean + self.at * step_noise(clean, info, run, draw)
        return run.evaluate(info._replace(x=noisy, sigma=self.at, alpha=1.0, s=self.at), (COND,))["cond"]
