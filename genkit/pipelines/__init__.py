"""Pipelines: conditions in, images out."""

from genkit.pipelines.diffusion import ClassPipeline
from genkit.pipelines.loading import load
from genkit.pipelines.output import Output

__all__ = ["ClassPipeline", "Output", "load"]
