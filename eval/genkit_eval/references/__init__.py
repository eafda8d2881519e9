"""References: statistics of real images, made here or by other tools."""

from __future__ import annotations

from genkit_eval.references.build import Work as Work
from genkit_eval.references.build import build as build
from genkit_eval.references.contents import Contents as Contents
from genkit_eval.references.contents import Layer as Layer
from genkit_eval.references.file import write_npz as write_npz
from genkit_eval.references.file import write_safetensors as write_safetensors
from genkit_eval.references.load import Reference as Reference
from genkit_eval.references.load import load_reference as load_reference
from genkit_eval.references.load import read_contents as read_contents
