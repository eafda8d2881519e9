"""genkit: every guidance method on every image generator, at the cost it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from genkit.denoiser import EDMDenoiser, Guided
    from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled, Trace, parse, preset
    from genkit.pipelines import ClassPipeline, DiffusersPipeline, Output, load
    from genkit.pipelines.attach import attach
    from genkit.pipelines.to_diffusers import to_diffusers
    from genkit.samplers import SAMPLERS, Sampler, sample

_HOME = {
    "genkit.denoiser": ("EDMDenoiser", "Guided"),
    "genkit.guidance": ("APG", "CFG", "Adaptive", "Guidance", "Interval", "NoGuidance", "Scheduled", "Trace", "parse", "preset"),
    "genkit.pipelines": ("ClassPipeline", "DiffusersPipeline", "Output", "load"),
    "genkit.pipelines.attach": ("attach",),
    "genkit.pipelines.to_diffusers": ("to_diffusers",),
    "genkit.samplers": ("SAMPLERS", "Sampler", "sample"),
}
_MODULES = ("denoiser", "guidance", "models", "noise", "pipelines", "random", "samplers", "training")

__all__ = [
    "APG",
    "CFG",
    "SAMPLERS",
    "Adaptive",
    "ClassPipeline",
    "DiffusersPipeline",
    "EDMDenoiser",
    "Guidance",
    "Guided",
    "Interval",
    "NoGuidance",
    "Output",
    "Sampler",
    "Scheduled",
    "Trace",
    "attach",
    "load",
    "parse",
    "preset",
    "sample",
    "to_diffusers",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first used, so that ``import genkit`` costs nothing."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    if name in _MODULES:
        return importlib.import_module(f"genkit.{name}")
    raise AttributeError(f"module 'genkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
