"""Solvers of the probability flow. A new one is a file in this folder with a ``@register`` step function."""

from __future__ import annotations

import importlib
import pkgutil

from genkit.samplers.diffusion.loop import SAMPLERS, Point, Sampler, Step, direction, find_sampler, register, sample, start

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SAMPLERS", "Point", "Sampler", "Step", "direction", "find_sampler", "register", "sample", "start"]
