"""From floats to 8 bits: the rules in use. They differ by up to half a level in the mean, so the rule is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uint8Rule:
    """``name`` and ``formula`` are what results say; the call maps images in [-1, 1], any shape, to uint8."""

    name: str
    formula: str
    apply: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError for NaN or infinite values, which 8 bits would hide."""
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the images hold NaN or infinity")
        return self.apply(x.detach().float()).clamp(0, 255).to(torch.uint8)


#: ``adm-floor``: guided-diffusion, torchmetrics. ``edm``: EDM, EDM2's pixels. ``half-up``: VAR, LlamaGen, torchvision.
#: ``half-even``: diffusers, MAR.
UINT8_RULES = {
    rule.name: rule
    for rule in (
        Uint8Rule("adm-floor", "floor(127.5 (x + 1)) clamped to 0..255", lambda x: (x + 1) * 127.5),
        Uint8Rule("edm", "floor(127.5 x + 128) clamped to 0..255", lambda x: x * 127.5 + 128),
        Uint8Rule("half-up", "floor(255 (x + 1) / 2 + 0.5) clamped to 0..255", lambda x: (x + 1) / 2 * 255 + 0.5),
        Uint8Rule("half-even", "255 (x + 1) / 2 rounded half to even, clamped to 0..255", lambda x: ((x + 1) / 2 * 255).round()),
    )
}


def rule_of(formula: str) -> Uint8Rule | None:
    """The rule with this formula, under which a pipeline names its own too."""
    return next((rule for rule in UINT8_RULES.values() if rule.formula == formula), None)
