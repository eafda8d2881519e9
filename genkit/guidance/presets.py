"""Settings that authors published or ship with their code, ready to use."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from genkit.guidance.base import Guidance, classes
from genkit.guidance.expressions import build


class Preset(NamedTuple):
    """A published setting. ``metric`` is what its source reports for it, None where it reports none."""

    name: str
    expression: str  # in this package's convention of scales: 1 is no guidance
    model: str
    source: str
    metric: str | None = None


_EDM2 = "NVlabs/edm2, presets of generate_images.py (Karras et al. 2024)"
_INTERVAL = "kynkaat/guidance-interval, README (Kynkaanniemi et al. 2024)"
_CFGPP = "CFGpp-diffusion/CFGpp, README (Chung et al. 2024)"
_DEFAULTS = "defaults of diffusers 0.42.1, the CFG scale too: "
_MODULAR = "default of the modular pipeline in diffusers 0.42.1"

PRESETS: tuple[Preset, ...] = (
    Preset("edm2-s-512/autoguidance", "Autoguidance(2.10)", "EDM2-S ImageNet-512 and its weak network", _EDM2, "FID 1.34"),
    Preset("edm2-xxl-512/autoguidance", "Autoguidance(2.05)", "EDM2-XXL ImageNet-512 and its weak network", _EDM2, "FID 1.25"),
    Preset(
        "edm2-s-512/autoguidance-dino", "Autoguidance(2.45)", "EDM2-S ImageNet-512 and its weak network", _EDM2, "FD_DINOv2 36.67"
    ),
    Preset(
        "edm2-xxl-512/autoguidance-dino",
        "Autoguidance(2.30)",
        "EDM2-XXL ImageNet-512 and its weak network",
        _EDM2,
        "FD_DINOv2 24.18",
    ),
    Preset("edm2-s-64/autoguidance", "Autoguidance(1.70)", "EDM2-S ImageNet-64 and its weak network", _EDM2, "FID 1.01"),
    Preset(
        "edm2-s-512-uncond/autoguidance", "Autoguidance(2.85)", "unconditional EDM2-S and its weak network", _EDM2, "FID 3.86"
    ),
    Preset(
        "edm2-xxl-512/interval",
        "Interval(Autoguidance(2.0, condition='uncond'), 0.19, 1.61)",
        "EDM2-XXL ImageNet-512; weak: the unconditional EDM2-XS; 32 Heun steps",
        _INTERVAL,
        "FID 1.40",
    ),
    Preset(
        "dit-xl-2/interval",
        "Interval(CFG(2.5), 0.34, 1.02)",
        "DiT-XL/2 ImageNet-256",
        "kynkaat/guidance-interval, issue 1",
        "FID 2.40",
    ),
    Preset("sdxl/interval", "Interval(CFG(16.0), 0.28, 5.42)", "Stable Diffusion XL", _INTERVAL),
    Preset(
        "sdxl/fdg", "FDG((10.0, 5.0))", "Stable Diffusion XL", "diffusers 0.42.1, FrequencyDecoupledGuidance (arXiv 2506.19713)"
    ),
    Preset("sdxl/seg", "Sum(CFG(3.0), SEG(4.0, layers=('mid',)))", "Stable Diffusion XL", "SusungHong/SEG-SDXL (Hong 2024)"),
    Preset("sd/pag", "Sum(CFG(7.5), PAG(4.0, layers=('mid',)))", "Stable Diffusion 1.5", f"{_DEFAULTS}PAG pipeline"),
    Preset("sdxl/pag", "Sum(CFG(5.0), PAG(4.0, layers=('mid',)))", "Stable Diffusion XL", f"{_DEFAULTS}PAG pipeline"),
    Preset("sd/cfgpp", "CFGPP(0.6)", "Stable Diffusion 1.5 and XL", _CFGPP),
    Preset("sdxl-lightning/cfgpp", "CFGPP(1.0)", "Stable Diffusion XL Lightning", _CFGPP),
    Preset(
        "sd3.5-medium/slg",
        "Sum(CFG(7.0), Interval(SLG(3.8, layers=('7', '8', '9')), 0.01, 0.2, 'fraction'))",
        "Stable Diffusion 3.5 Medium",
        f"{_DEFAULTS}pipeline, and the layers it names",
    ),
    Preset("sd3.5-large/raag", "RAAG(18.0, alpha=12.0)", "Stable Diffusion 3.5 Large", "authors' code (arXiv 2508.03442)"),
    Preset(
        "sd3/rectified-cfgpp",
        "RectifiedCFGPP(5.5, noise=0.005)",
        "Stable Diffusion 3, 28 steps",
        "shreshthsaini/Rectified-CFGpp, demo",
    ),
    Preset(
        "hunyuanimage-2.1/apg",
        "APGMix(CFG(3.5), APG(11.0, momentum=-0.5, threshold=10.0), last=5)",
        "HunyuanImage 2.1",
        "diffusers 0.42.1; close to theirs, which adds the update 10 times to the unconditional prediction",
    ),
    Preset(
        "var/cfg",
        "Scheduled(CFG(2.5), 'linear', preserve_mean=False)",
        "VAR ImageNet-256",
        "FoundationVision/VAR, whose cfg is 1.5",
    ),
    Preset("qwen-image/cfg", "CFG(4.0)", "Qwen-Image", _MODULAR),
    Preset("wan2.1/cfg", "CFG(5.0)", "Wan 2.1", _MODULAR),
    Preset("wan2.2-high-noise/cfg", "CFG(4.0)", "Wan 2.2, first transformer", _MODULAR),
    Preset("wan2.2-low-noise/cfg", "CFG(3.0)", "Wan 2.2, second transformer", _MODULAR),
    Preset(
        "wan2.1/zero-star",
        "ZeroInit(CFGZeroStar(5.0), steps=2)",
        "Wan 2.1",
        "WeichenFan/CFG-Zero-star (Fan et al. 2025), with the model's own scale",
    ),
    Preset(
        "adm-lsun/minority",
        "MinorityGuidance(4.5, level=99)",
        "ADM LSUN, 250 ancestral steps, and a classifier of 100 levels",
        "soobin-um/minority-guidance (Um et al. 2024)",
    ),
)


def preset(name: str) -> Guidance:
    """The guidance of one row of :data:`PRESETS`.

    Args:
        name: its name, in any case.

    Raises:
        ValueError: an unknown name, with the nearest known ones.
    """
    rows = {row.name: row for row in PRESETS}
    key = name.strip().lower() if isinstance(name, str) else ""
    if key not in rows:
        near = difflib.get_close_matches(key, rows, n=3, cutoff=0.5)
        raise ValueError(
            f"preset={name!r} is unknown; " + (f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(rows)}")
        )
    made: Guidance = build(rows[key].expression, classes(), f"preset {key}")
    return made
