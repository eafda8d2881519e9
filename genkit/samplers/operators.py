"""Linear measurements ``y = A x`` of an image, and conjugate gradients for them, one system per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LinearOperator(Protocol):
    """``A`` maps images (B, ...) to measurements (B, ...), ``AT`` is its adjoint: ``<A x, y> = <x, AT y>``, for every sample."""

    def A(self, x: Tensor) -> Tensor: ...

    def AT(self, y: Tensor) -> Tensor: ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Hermitian inner product ``sum conj(a) b`` of each sample, shaped (B, 1, ...); its real part for complex numbers."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, x: Tensor, steps: int = 5, tolerance: float = 0.0
) -> Tensor:
    """Solve ``M x = right`` for a Hermitian, positive semi-definite M by at most ``steps`` iterations from ``x``.

    Every sample is a system of its own: it stops alone, where its residual is at or below ``tolerance``, and where nothing is
    left to do (a start at the solution, or a direction that M does not see). Real and complex unknowns. Differentiable.

    Args:
        apply: M, on (B, ...).
        right: (B, ...).
        x: (B, ...) the start.
        steps: largest number of iterations, from 0.
        tolerance: norm of a sample's residual.
    """
    residual = right - apply(x)
    direction, square = residual, dot(residual, residual)
    for _ in range(steps):
        image = apply(direction)
        curvature = dot(direction, image)
        going = (square > tolerance**2) & (curvature > 0)
        length = torch.where(going, square, 0.0) / torch.where(going, curvature, 1.0)
        x, residual = x + length * direction, residual - length * image
        before, square = square, dot(residual, residual)
        direction = residual + torch.where(going, square, 0.0) / torch.where(going, before, 1.0) * direction
    return x


@dataclass(frozen=True)
class Masking:
    """``y = mask x``: inpainting. ``mask`` is 1 where a value is known and 0 elsewhere, and broadcasts over images."""

    mask: Tensor

    def A(self, x: Tensor) -> Tensor:
        return self.mask.to(x) * x

    def AT(self, y: Tensor) -> Tensor:
        return self.A(y)


@dataclass(frozen=True)
class BoxDownsampling:
    """Means over blocks of ``factor`` x ``factor`` pixels of images (B, C, H, W) whose sides are multiples of it."""

    factor: int

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor < 1:
            raise ValueError(f"factor={self.factor!r} must be an integer from 1 on")

    def A(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"factor={self.factor} does not divide an image of {x.shape[-2]} x {x.shape[-1]} pixels")
        return functional.avg_pool2d(x, self.factor)

    def AT(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1) / self.factor**2


@dataclass(frozen=True)
class GaussianBlur:
    """Convolution of images (B, C, H, W) with a Gaussian of ``sigma`` pixels (cut at 4 sigma), as if they were periodic.

    It is its own adjoint.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r} must be a positive number of pixels")

    def A(self, x: Tensor) -> Tensor:
        radius = math.ceil(4 * self.sigma)
        if radius >= min(x.shape[-2:]):
            raise ValueError(f"sigma={self.sigma}: the kernel is wider than an image of {x.shape[-2]} x {x.shape[-1]} pixels")
        kernel = torch.exp(-(torch.arange(-radius, radius + 1, device=x.device) ** 2) / (2 * self.sigma**2)).to(x)
        kernel = kernel / kernel.sum()
        for dim in (-2, -1):
            x = sum((w * x.roll(i - radius, dim) for i, w in enumerate(kernel)), torch.zeros_like(x))
        return x

    def AT(self, y: Tensor) -> Tensor:
        return self.A(y)


@dataclass(frozen=True)
class MaskedFFT:
    """``y = mask F (sens x)``: magnetic resonance, F the centred orthonormal 2-D Fourier transform.

    Args:
        mask: (..., H, W), 1 for measured frequencies.
        sens: (1, coils, H, W) complex coil sensitivities of images (B, 1, H, W); None is a single coil that sees all alike.
    """

    mask: Tensor
    sens: Tensor | None = None

    def A(self, x: Tensor) -> Tensor:
        seen = x if self.sens is None else self.sens.to(x.device) * x
        return self.mask.to(x.device) * _centred(torch.fft.fft2, seen)

    def AT(self, y: Tensor) -> Tensor:
        x = _centred(torch.fft.ifft2, self.mask.to(y.device) * y)
        if self.sens is None:
            return x
        return (self.sens.to(y.device).conj() * x).sum(1, keepdim=True)


def _centred(transform: Callable[..., Tensor], x: Tensor) -> Tensor:
    dims = (-2, -1)
    centred: Tensor = torch.fft.fftshift(transform(torch.fft.ifftshift(x, dim=dims), norm="ortho"), dim=dims)
    return centred


__all__ = ["BoxDownsampling", "GaussianBlur", "LinearOperator", "MaskedFFT", "Masking", "conjugate_gradients"]
