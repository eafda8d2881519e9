"""Perturbed-attention guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genkit.guidance.base import Perturbation
from genkit.guidance.perturbed import _Perturbed


@dataclass(frozen=True)
class PAG(_Perturbed):
    """``D = D_c + (w - 1)(D_c - D_p)``; in D_p self-attention returns its values, its map being the identity (Ahn et al. 2024).

    Both branches have the same condition, so the unconditional prediction is not needed: 2 rows a sample. To have
    classifier-free guidance too, add it: ``Sum(CFG(w'), PAG(w))``, 3 rows.

    Args:
        scale: w, 1 means no guidance. The paper's s and the ``pag_scale`` of diffusers are w - 1: their 3.0 is 4.0 here.
        layers: names of the attention layers, as the network calls them; () is its own choice, usually those in the middle.

    Raises:
        ValueError: scale is not a finite number, layers are not names; when run: the network lacks a layer or cannot be weakened.
    """

    layers: tuple[str, ...] = ()
    examples: ClassVar[tuple[str, ...]] = ("PAG(4.0)", "PAG(2.5, layers=('mid',))")

    @property
    def perturbation(self) -> Perturbation:
        return Perturbation("identity", self.layers)
