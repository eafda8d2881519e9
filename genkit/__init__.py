"""genkit: every guidance method on every image generator, at the cost it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from genkit.attention import use_attention
    from genkit.denoiser import EDMDenoiser, Guided
    from genkit.guidance import APG, CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled, Trace, parse, preset
    from genkit.pipelines import (
        ClassPipeline,
        DiffusersPipeline,
        FlowScalePipeline,
        Output,
        ScalePipeline,
        Speculative,
        TokenPipeline,
        load,
    )
    from genkit.pipelines.attach import attach
    from genkit.pipelines.attention_diffusers import set_attention
    from genkit.pipelines.hoist import hoist
    from genkit.pipelines.to_diffusers import to_diffusers
    from genkit.samplers import SAMPLERS, Sampler, sample
    from genkit.samplers.autoregressive.filters import Filters
    from genkit.samplers.autoregressive.flow_scale import flowar_guidance
    from genkit.samplers.autoregressive.next_scale import known_tokens, var_guidance
    from genkit.samplers.autoregressive.speculative import DynamicTree, Exact, Lantern, ModelDrafter, StaticTree

_HOME = {
    "genkit.attention": ("use_attention",),
    "genkit.denoiser": ("EDMDenoiser", "Guided"),
    "genkit.guidance": ("APG", "CFG", "Adaptive", "Guidance", "Interval", "NoGuidance", "Scheduled", "Trace", "parse", "preset"),
    "genkit.pipelines": (
        "ClassPipeline",
        "DiffusersPipeline",
        "FlowScalePipeline",
        "Output",
        "ScalePipeline",
        "Speculative",
        "TokenPipeline",
        "load",
    ),
    "genkit.pipelines.attach": ("attach",),
    "genkit.pipelines.attention_diffusers": ("set_attention",),
    "genkit.pipelines.hoist": ("hoist",),
    "genkit.pipelines.to_diffusers": ("to_diffusers",),
    "genkit.samplers": ("SAMPLERS", "Sampler", "sample"),
    "genkit.samplers.autoregressive.filters": ("Filters",),
    "genkit.samplers.autoregressive.flow_scale": ("flowar_guidance",),
    "genkit.samplers.autoregressive.next_scale": ("known_tokens", "var_guidance"),
    "genkit.samplers.autoregressive.speculative": ("DynamicTree", "Exact", "Lantern", "ModelDrafter", "StaticTree"),
}
_MODULES = ("attention", "denoiser", "guidance", "models", "noise", "pipelines", "random", "samplers", "tokenizers", "training")

__all__ = [
    "APG",
    "CFG",
    "SAMPLERS",
    "Adaptive",
    "ClassPipeline",
    "DiffusersPipeline",
    "DynamicTree",
    "EDMDenoiser",
    "Exact",
    "Filters",
    "FlowScalePipeline",
    "Guidance",
    "Guided",
    "Interval",
    "Lantern",
    "ModelDrafter",
    "NoGuidance",
    "Output",
    "Sampler",
    "ScalePipeline",
    "Scheduled",
    "Speculative",
    "StaticTree",
    "TokenPipeline",
    "Trace",
    "attach",
    "flowar_guidance",
    "hoist",
    "known_tokens",
    "load",
    "parse",
    "preset",
    "sample",
    "set_attention",
    "to_diffusers",
    "use_attention",
    "var_guidance",
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
