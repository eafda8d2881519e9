"""Smoothed-energy guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from genkit.guidance.base import Perturbation, check_number
from genkit.guidance.perturbed import _Perturbed


@dataclass(frozen=True)
class SEG(_Perturbed):
    """``D = D_c + (w - 1)(D_c - D_p)``; in D_p the queries of self-attention are blurred over the image (Hong 2024, sec. 4).

    Both branches have the same condition: 2 rows a sample. With classifier-free guidance: ``Sum(CFG(w'), SEG(w))``, 3 rows.

    Args:
        scale: w, 1 means no guidance. The paper's s and that of diffusers are w - 1: their 3.0 is 4.0 here.
        sigma: standard deviation of the Gaussian in token widths, above 0; inf (the paper's choice) is the mean over the image.
        layers: names of the attention layers, as the network calls them; () is its own choice, usually those in the middle.

    Raises:
        ValueError: a number outside its range, layers are not names; when run: the network lacks a layer or cannot be weakened.
    """

    sigma: float = math.inf
    layers: tuple[str, ...] = ()
    examples: ClassVar[tuple[str, ...]] = ("SEG(4.0)", "SEG(3.0, sigma=2.0, layers=('mid',))")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "sigma", 0.0, math.inf)
        if self.sigma == 0:
            raise ValueError("SEG: sigma=0.0 blurs nothing; use a positive number, or inf for the mean over the image")

    @property
    def perturbation(self) -> Perturbation:
        return Perturbation("blur", self.layers, self.sigma)
