"""Models whose denoiser and probability flow are known in closed form, and a run of a sampler over them. Float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import NoGuidance
from genkit.noise import FLOW, VE, VP, Path
from genkit.samplers import SAMPLERS, sample

PATHS = [VE, VP, FLOW]
NOISE_OPTIONS = ("eta", "churn", "corrections", "times")


def coordinates(path: Path, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, s) for a vector of noise levels, written out anew; regular at inf but for the ve path."""
    if path.name == "ve":
        return torch.ones_like(sigma), sigma
    if path.name == "vp":
        return (1 + sigma**2).rsqrt(), (1 + sigma**-2).rsqrt()
    return 1 / (1 + sigma), 1 / (1 + 1 / sigma)


class Gaussians:
    """The exact denoiser of N(means[c], variances[c]) in every dimension, c the condition (B,)."""

    def __init__(self, means=(0.0,), variances=(1.0,), path: Path = VE) -> None:
        self.means, self.variances = (torch.as_tensor(v, dtype=torch.float64) for v in (means, variances))
        self.path, self.rows = path, []

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.rows.append(len(x))
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, s = (v.reshape(shape) for v in coordinates(self.path, sigma))
        mean, variance = self.means.to(x)[condition].reshape(shape), self.variances.to(x)[condition].reshape(shape)
        return (mean + alpha * variance * (x - alpha * mean) / (alpha**2 * variance + s**2)).to(x)


class Mixture:
    """The exact denoiser of ``sum_k w_k N(m_k, std^2 I)`` in d dimensions; conditions are ignored."""

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None, path: Path = VE) -> None:
        self.means, self.std, self.path = means.double(), std, path
        self.weights = torch.full((len(means),), 1 / len(means)).double() if weights is None else weights.double()

    def __call__(self, x: Tensor, sigma: Tensor, condition: object) -> Tensor:
        alpha, s = (v[:, None, None] for v in coordinates(self.path, sigma.to(x)))
        variance = (alpha * self.std) ** 2 + s**2
        away = x[:, None] - alpha * self.means.to(x)
        logits = self.weights.to(x).log() - away.square().sum(-1) / (2 * variance[..., 0])
        each = self.means.to(x) + alpha * self.std**2 * away / variance
        return (logits.softmax(1)[..., None] * each).sum(1)

    def draw(self, count: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=g)
        return self.means[k] + self.std * torch.randn(count, self.means.shape[1], generator=g, dtype=torch.float64)


TRIANGLE = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]])


def flow(x: Tensor, mean: float, variance: float, path: Path, start: float, end: float) -> Tensor:
    """Where the probability flow of N(mean, variance) takes ``x`` from noise level ``start`` (inf allowed) to ``end``."""
    (a0, s0), (a1, s1) = (coordinates(path, torch.tensor(v, dtype=torch.float64)) for v in (start, end))
    shrink = ((a1**2 * variance + s1**2) / (a0**2 * variance + s0**2)).sqrt()
    return a1 * mean + (x - a0 * mean) * shrink


def geometric(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(math.log(start), math.log(end), steps + 1, dtype=torch.float64).exp()


def noise_free(name: str):
    """The sampler with its noise turned off."""
    sampler = SAMPLERS[name]
    return sampler(**{key: 0.0 for key in NOISE_OPTIONS if key in sampler.options})


def solve(model, x, sigmas, sampler, path=VE, guidance=None, conditions=None, noise=None, run=None, **options):
    """The end of a run. The default condition is label 0. ``run`` collects the Guided object."""
    conditions = conditions or {"cond": torch.zeros(len(x), dtype=torch.long)}
    guided = Guided(model, guidance or NoGuidance(), conditions, len(x), trace="none")
    if run is not None:
        run.append(guided)
    return sample(guided, x, sigmas, sampler, path, noise, **options)
