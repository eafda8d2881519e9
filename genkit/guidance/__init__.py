"""Guidance methods and combinators. A new method is one file in this folder; importing it registers its class."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points

from genkit.guidance import base
from genkit.guidance.adaptive import Adaptive
from genkit.guidance.apg import APG
from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Result, StepInfo
from genkit.guidance.cfg import CFG
from genkit.guidance.expressions import build
from genkit.guidance.interval import Interval
from genkit.guidance.none import NoGuidance
from genkit.guidance.scheduled import Scheduled
from genkit.guidance.trace import Trace

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_plugins_loaded = False


def registry() -> dict[str, type[Guidance]]:
    """Every guidance class by name: those of this folder, of entry points in the group ``genkit.guidance``, and your own."""
    global _plugins_loaded
    if not _plugins_loaded:
        for point in entry_points(group="genkit.guidance"):
            try:
                point.load()  # defining the class registers it
            except Exception as error:  # one broken plug-in must not take the others with it
                warnings.warn(f"guidance plug-in {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=2)
        _plugins_loaded = True
    return base.classes()


def parse(text: str) -> Guidance:
    """The guidance a text describes, for example ``"Interval(APG(4.0), 0.28, 5.42)"`` or ``"none"``.

    The text is parsed, never run. ``repr`` of any guidance reads back as the same object.

    Raises:
        ValueError: an unknown name, anything that is not a guidance expression, or arguments that a class refuses.
    """
    if isinstance(text, str) and text.strip().lower() == "none":
        return NoGuidance()
    result = build(text, registry(), "guidance")
    if not isinstance(result, Guidance):
        raise ValueError(f"guidance={text!r} is a {type(result).__name__}, not a guidance; write for example 'CFG(3.0)'")
    return result


__all__ = [
    "APG",
    "CFG",
    "COND",
    "UNCOND",
    "Adaptive",
    "Branch",
    "Guidance",
    "Interval",
    "NoGuidance",
    "Result",
    "Scheduled",
    "StepInfo",
    "Trace",
    "parse",
    "registry",
]
