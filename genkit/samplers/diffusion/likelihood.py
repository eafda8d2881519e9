"""The variational bound of a discrete chain, in bits per dimension. Everything in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genkit.denoiser import Condition, Denoiser
from genkit.noise import VP
from genkit.random import Noise
from genkit.samplers.diffusion.process import Process

FLOOR = 1e-12  # the smallest probability of a value in the published likelihoods


def normal_kl(mean: Tensor, log_variance: Tensor, mean_2: Tensor | float, log_variance_2: Tensor | float) -> Tensor:
    """``KL(N(mean, e^log_variance) || N(mean_2, e^log_variance_2))`` of each value, in nats."""
    difference = log_variance - log_variance_2
    precision = torch.exp(-torch.as_tensor(log_variance_2, dtype=mean.dtype, device=mean.device))
    return (difference.exp() - 1 - difference + (mean - mean_2).square() * precision) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor, floor: float = FLOOR) -> Tensor:
    """Log-probability of each value's bin under N(mean, e^(2 log_std)), in nats (Ho et al. 2020, eq. 13).

    Bins reach 1/255 to both sides, the outermost to infinity. With the logistic form of the tanh approximation of the normal CDF,
    ``Phi(z) = S(2 u)``, ``u = sqrt(2 / pi) (z + 0.044715 z^3)``, the probability of a bin is
    ``S(a) S(-b) (1 - e^(b - a))``: no difference of two nearly equal numbers.

    Args:
        x: values in [-1, 1], multiples of 2/255.
        mean, log_std: of the normal law, same shape.
        floor: smallest probability; 0 leaves the tails as they are.
    """
    upper, lower = (_logit(((x - mean) + half) * torch.exp(-log_std)) for half in (1 / 255, -1 / 255))
    inside = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
    value = torch.where(x < -0.999, logsigmoid(upper), torch.where(x > 0.999, logsigmoid(-lower), inside))
    return value.clamp_min(math.log(floor)) if floor else value


def _logit(z: Tensor) -> Tensor:
    """2 u: the argument of the logistic function that stands for the normal CDF at z."""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def bits_per_dim(nats: Tensor) -> Tensor:
    """Mean over all but the batch axis, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)


def vlb_term(process: Process, x0: Tensor, x: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) the bound's term at step ``t`` (B,), in bits per dimension, with ``x`` drawn from q(x_t | x0).

    ``KL(q(x_{t-1} | x_t, x0) || N(mean, e^log_variance))``, at t = 0 the negative log-likelihood of the bins
    (Nichol & Dhariwal 2021, eq. 4 to 7).
    """
    small = process.at(process.log_range[0], t, x)
    kl = bits_per_dim(normal_kl(process.posterior_mean(x0, x, t), small, mean, log_variance))
    nll = -bits_per_dim(discretized_log_likelihood(x0, mean, log_variance / 2))
    return torch.where(t == 0, nll, kl)


def prior_term(process: Process, x0: Tensor) -> Tensor:
    """(B,) ``KL(q(x_T | x0) || N(0, I))`` in bits per dimension: what the chain does not destroy."""
    abar = float(process.alphas_cumprod[-1])
    log_variance = torch.full_like(x0, math.log(1 - abar))
    return bits_per_dim(normal_kl(math.sqrt(abar) * x0, log_variance, 0.0, 0.0))


class Bound(NamedTuple):
    """``total`` (B,) bits per dimension, the sum of ``terms`` (B, T), t falling, and ``prior`` (B,)."""

    total: Tensor
    terms: Tensor
    prior: Tensor


def nll(
    denoiser: Denoiser,
    x0: Tensor,
    process: Process,
    noise: Noise,
    condition: Condition = None,
    fraction: float | Callable[[], Tensor] = 0.0,
    clip: bool = False,
) -> Bound:
    """An upper bound on the negative log-likelihood of images, in bits per dimension: T evaluations.

    Args:
        denoiser: on any path.
        x0: (B, ...) images in [-1, 1], multiples of 2/255.
        process: the chain.
        noise: asked with index k in the k-th step, the noisiest first.
        condition: of the denoiser.
        fraction: of the variance between beta_tilde (0) and beta (1), or a function that gives it after each evaluation, for
            example ``lambda: learned.fraction``.
        clip: clamp the denoiser's estimate to [-1, 1].

    Raises:
        ValueError: x0 outside [-1, 1].
    """
    if x0.abs().max() > 1:
        raise ValueError(f"x0 reaches {float(x0.abs().max()):.3g}: give images in [-1, 1]")
    x0, terms = x0.double(), []
    for k, t in enumerate(range(len(process) - 1, -1, -1)):
        at = torch.full((len(x0),), t, device=x0.device)
        x, sigma = process.noised(x0, noise(x0, k), at), float(process.sigmas[k])
        scale = denoiser.path(sigma)[0] / VP(sigma)[0]
        estimate = denoiser(scale * x, at.double() * 0 + sigma, condition).double()
        estimate = estimate.clamp(-1, 1) if clip else estimate
        f = fraction().double() if callable(fraction) else fraction
        log_variance = process.log_variance(at, x, f)
        terms.append(vlb_term(process, x0, x, at, process.posterior_mean(estimate, x, at), log_variance))
    every, prior = torch.stack(terms, 1), prior_term(process, x0)
    return Bound(every.sum(1) + prior, every, prior)


__all__ = ["Bound", "bits_per_dim", "discretized_log_likelihood", "nll", "normal_kl", "prior_term", "vlb_term"]
