"""Guidance with the contrast of the conditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genkit.guidance.base import check_number
from genkit.guidance.measures import ratio, spread
from genkit.guidance.postprocess import _PostProcess


@dataclass(frozen=True)
class Rescaled(_PostProcess):
    """``phi g std(c) / std(g) + (1 - phi) g``, g being ``inner`` and c the conditional prediction (Lin et al. 2023, sec. 3.4).

    Unbiased std per sample over all axes. Nothing is changed where ``inner`` does not guide (scale 1, outside an interval), and
    a constant g stays as it is.

    Args:
        inner: any guidance that does not ask for ``refine``.
        phi: from 0 (no change) to 1 (the std of c); the paper's is 0.7.
        space: where g and c are compared: ``"v"``, the space of the paper's models; ``"eps"``, ``"flow"`` or ``"x0"``. diffusers'
            ``guidance_rescale`` works in the space of the network's output, whichever that is.

    Raises:
        ValueError: phi outside its range, an unknown space, or an inner guidance that asks for ``refine``.
    """

    phi: float = 0.7
    examples: ClassVar[tuple[str, ...]] = (
        "Rescaled(CFG(5.0))",
        "Rescaled(Interval(APG(4.0, momentum=-0.5), 0.2, 5.0), 0.5, space='x0')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "phi", 0.0, 1.0)

    def process(self, guided: Tensor, cond: Tensor) -> Tensor:
        return guided * (self.phi * ratio(spread(cond), spread(guided)) + 1 - self.phi)
