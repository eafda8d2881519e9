"""Pipelines: conditions in, images out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.pipelines.diffusion import ClassPipeline
from genkit.pipelines.loading import load
from genkit.pipelines.output import Output
from genkit.pipelines.speculative import Speculative

if TYPE_CHECKING:
    from genkit.pipelines.diffusers_pipeline import DiffusersPipeline

_HOME = {"DiffusersPipeline": "diffusers_pipeline"}

__all__ = [
    "ClassPipeline",
    "DiffusersPipeline",
    "FlowScalePipeline",
    "Output",
    "ScalePipeline",
    "Speculative",
    "TokenPipeline",
    "load",
]


def __getattr__(name: str) -> Any:
    """What stands on diffusers is loaded when it is first used: that takes seconds, and diffusers is optional."""
    if name in _HOME:
        return getattr(importlib.import_module(f"genkit.pipelines.{_HOME[name]}"), name)
    raise AttributeError(f"module 'genkit.pipelines' has no attribute {name!r}")
