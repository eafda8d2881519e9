"""Metrics over features and pixels, exact in float64; a file in this folder that registers a ``Spec`` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from genkit_eval.metrics.registry import METRICS as METRICS
from genkit_eval.metrics.registry import Spec as Spec
from genkit_eval.metrics.registry import register as register
from genkit_eval.metrics.registry import unavailable as unavailable
from genkit_eval.metrics.sample import Pair as Pair
from genkit_eval.metrics.sample import Sample as Sample

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
