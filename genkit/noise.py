"""Noise levels, paths and parameterisations: the one place where they are converted.

A noisy image is ``x = alpha x0 + s n`` with ``n ~ N(0, I)``. Its noise level is ``sigma = s / alpha``, the EDM noise level;
a *path* says which (alpha, s) belongs to a sigma. A network's output is converted to and from the clean-image estimate D
(space ``x0``) here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Space = Literal["x0", "eps", "v", "flow"]
SPACES: tuple[str, ...] = get_args(Space)


@dataclass(frozen=True)
class Path:
    """A family of coordinates ``x = alpha(sigma) x0 + s(sigma) n`` with ``s / alpha = sigma``.

    ``ve``: (1, sigma), as EDM networks expect. ``vp``: (1, sigma) / sqrt(1 + sigma^2). ``flow``: (1, sigma) / (1 + sigma),
    whose time is t = s. sigma = inf (pure noise, alpha = 0) is a regular point of the last two.
    """

    name: Literal["ve", "vp", "flow"]

    def __call__(self, sigma: float) -> tuple[float, float]:
        """(alpha, s) at one noise level, 0 <= sigma <= inf. Raises ValueError for sigma = inf on the ``ve`` path."""
        if self.name == "ve":
            if math.isinf(sigma):
                raise ValueError(
                    "sigma=inf has no place on the 've' path (alpha is 1 there); use 'vp' or 'flow', or a finite sigma_max"
                )
            return 1.0, sigma
        if math.isinf(sigma):
            return 0.0, 1.0
        alpha = 1 / math.sqrt(1 + sigma * sigma) if self.name == "vp" else 1 / (1 + sigma)
        return alpha, sigma * alpha


VE, VP, FLOW = Path("ve"), Path("vp"), Path("flow")


def to_x0(prediction: Tensor, x: Tensor, alpha: float, s: float, space: Space) -> Tensor:
    """Clean-image estimate D from a prediction in ``space``.

    eps: ``D = (x - s eps) / alpha``; v = alpha n - s x0: ``D = (alpha x - s v) / (alpha^2 + s^2)``;
    flow = n - x0: ``D = (x - s v) / (alpha + s)``. All but eps are regular at alpha = 0.

    Raises:
        ValueError: unknown ``space``, or eps at alpha = 0 (pure noise says nothing about x0).
    """
    if space == "x0":
        return prediction
    if space == "eps":
        if alpha == 0:
            raise ValueError("space='eps' cannot be converted to x0 at alpha=0 (sigma=inf); use 'v' or 'flow', or a finite sigma")
        return torch.sub(x, prediction, alpha=s) / alpha  # sub with alpha is two operations in one
    if space == "v":
        return torch.sub(alpha * x, prediction, alpha=s) / (alpha * alpha + s * s)
    if space == "flow":
        return torch.sub(x, prediction, alpha=s) / (alpha + s)
    raise ValueError(f"space={space!r}: use one of {', '.join(SPACES)}")


def from_x0(denoised: Tensor, x: Tensor, alpha: float, s: float, space: Space) -> Tensor:
    """The prediction in ``space`` that belongs to the clean-image estimate D: the inverse of :func:`to_x0`.

    Raises:
        ValueError: unknown ``space``, or s = 0 for any space but x0 (the noise is not determined by a clean image).
    """
    if space == "x0":
        return denoised
    if space not in SPACES:
        raise ValueError(f"space={space!r}: use one of {', '.join(SPACES)}")
    if s == 0:
        raise ValueError(f"s=0: a clean image has no prediction in space={space!r}; stay in x0 there")
    if space == "eps":
        return torch.sub(x, denoised, alpha=alpha) / s
    if space == "v":
        return torch.sub(alpha * x, denoised, alpha=alpha * alpha + s * s) / s
    return torch.sub(x, denoised, alpha=alpha + s) / s


# ---- grids: decreasing noise levels, (steps + 1,) float64, the last one 0 ----


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """``sigma_i = (max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho``, then 0 (Karras et al. 2022, eq. 5)."""
    _check(steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _close((high + ramp * (low - high)) ** rho, sigma_max)


def edm(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """The grid of the EDM sampler: :func:`karras` with rho = 7, whatever range a model asks for."""
    return karras(steps, sigma_min, sigma_max, 7.0)


def exponential(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels equally spaced in ln(sigma) from sigma_max to sigma_min, then 0."""
    _check(steps, sigma_min, sigma_max)
    return _close(torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp(), sigma_max)


def uniform_t(steps: int, sigma_min: float = 0.0, sigma_max: float = math.inf) -> Tensor:
    """Equal steps in flow time ``t = sigma / (1 + sigma)`` from t(sigma_max) to 0; sigma_max = inf starts at t = 1.

    sigma_min is accepted for a uniform signature and not used: the last step always ends at 0.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: use at least 1")
    if not sigma_max > 0:
        raise ValueError(f"sigma_max={sigma_max}: use a positive noise level, or inf")
    t_max = 1.0 if math.isinf(sigma_max) else sigma_max / (1 + sigma_max)
    t = torch.linspace(t_max, 0, steps + 1, dtype=torch.float64)
    return _close((t / (1 - t))[:-1], sigma_max)


GRIDS: dict[str, Callable[[int, float, float], Tensor]] = {
    "karras": karras,
    "edm": edm,
    "exponential": exponential,
    "uniform_t": uniform_t,
}


def _check(steps: int, sigma_min: float, sigma_max: float) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: use at least 1")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: use 0 < sigma_min <= sigma_max < inf")


def _close(sigmas: Tensor, sigma_max: float) -> Tensor:
    """Pin the first level (powers and logarithms round) and append the final 0."""
    sigmas[0] = sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)])
