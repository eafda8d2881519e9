"""Samplers: solvers of diffusion models."""

from genkit.samplers.diffusion import SAMPLERS, Sampler, sample

__all__ = ["SAMPLERS", "Sampler", "sample"]
