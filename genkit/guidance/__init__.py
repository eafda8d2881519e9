"""Guidance methods and combinators. A new method is one file in this folder; importing it registers its class."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points

from genkit.guidance import base
from genkit.guidance.adaptive import Adaptive
from genkit.guidance.apg import APG
from genkit.guidance.apg_mix import APGMix
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.base import COND, UNCOND, Branch, Guidance, Perturbation, Result, StepInfo
from genkit.guidance.cads import CADS
from genkit.guidance.cfg import CFG
from genkit.guidance.cfg_zero_star import CFGZeroStar
from genkit.guidance.cfgpp import CFGPP
from genkit.guidance.classifier import ClassifierGuidance
from genkit.guidance.dynamic_thresholding import DynamicThresholding
from genkit.guidance.expressions import build
from genkit.guidance.fdg import FDG
from genkit.guidance.icg import ICG
from genkit.guidance.interval import Interval
from genkit.guidance.linear_ag import LinearAG
from genkit.guidance.minority import MinorityGuidance, SelfMinority
from genkit.guidance.minority_prompt import MinorityPrompt
from genkit.guidance.momentum import MomentumGuidance
from genkit.guidance.none import NoGuidance
from genkit.guidance.norm_matched import NormMatched
from genkit.guidance.pag import PAG
from genkit.guidance.piecewise import Piecewise
from genkit.guidance.predictor_corrector import PredictorCorrector
from genkit.guidance.presets import PRESETS, Preset, preset
from genkit.guidance.raag import RAAG
from genkit.guidance.rectified_cfgpp import RectifiedCFGPP
from genkit.guidance.rescaled import Rescaled
from genkit.guidance.reuse_delta import ReuseDelta
from genkit.guidance.scheduled import Scheduled
from genkit.guidance.seg import SEG
from genkit.guidance.slg import SLG
from genkit.guidance.smc import SMC
from genkit.guidance.sum import Sum
from genkit.guidance.tcfg import TCFG
from genkit.guidance.trace import Trace
from genkit.guidance.zero_init import ZeroInit

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
        raise ValueError(f"guidance={text[:200]!r} is a {type(result).__name__}, not a guidance; write for example 'CFG(3.0)'")
    return result


__all__ = [
    "APG",
    "CADS",
    "CFG",
    "CFGPP",
    "COND",
    "FDG",
    "ICG",
    "PAG",
    "PRESETS",
    "RAAG",
    "SEG",
    "SLG",
    "SMC",
    "TCFG",
    "UNCOND",
    "APGMix",
    "Adaptive",
    "Autoguidance",
    "Branch",
    "CFGZeroStar",
    "ClassifierGuidance",
    "DynamicThresholding",
    "Guidance",
    "Interval",
    "LinearAG",
    "MinorityGuidance",
    "MinorityPrompt",
    "MomentumGuidance",
    "NoGuidance",
    "NormMatched",
    "Perturbation",
    "Piecewise",
    "PredictorCorrector",
    "Preset",
    "RectifiedCFGPP",
    "Rescaled",
    "Result",
    "ReuseDelta",
    "Scheduled",
    "SelfMinority",
    "StepInfo",
    "Sum",
    "Trace",
    "ZeroInit",
    "parse",
    "preset",
    "registry",
]
