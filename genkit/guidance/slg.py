"""Skip-layer guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genkit.guidance.base import Perturbation
from genkit.guidance.perturbed import _Perturbed


@dataclass(frozen=True)
class SLG(_Perturbed):
    """``D = D_c + (w - 1)(D_c - D_p)``; in D_p some blocks pass their input on (Hyung et al. 2024, spatiotemporal skip guidance).

    Both branches have the same condition: 2 rows a sample. With classifier-free guidance: ``Sum(CFG(w'), SLG(w))``, 3 rows.
    It is meant for the early steps: ``Sum(CFG(5.0), Interval(SLG(3.8, ...), 0.01, 0.2, 'fraction'))``.

    Args:
        scale: w, 1 means no guidance. Elsewhere the scale s is w - 1: 2.8 in Stable Diffusion 3.5 Medium is 3.8 here.
        layers: names of the blocks, as the network calls them; () is its own choice, usually the one in the middle.

    Raises:
        ValueError: scale is not a finite number, layers are not names; when run: the network lacks a layer or cannot be weakened.
    """

    layers: tuple[str, ...] = ()
    examples: ClassVar[tuple[str, ...]] = ("SLG(3.8)", "SLG(2.0, layers=('7', '8', '9'))")

    @property
    def perturbation(self) -> Perturbation:
        return Perturbation("skip", self.layers)
