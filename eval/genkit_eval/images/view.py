"""From a file's bytes to pixels: decoding, crop and size, as the published evaluators and training codes do it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit_eval.errors import InputError

CROPS = {
    "adm": "halved by box filter while twice as large, short side to the size by bicubic, centre square (guided-diffusion)",
    "center": "short side to the size by bicubic, centre square; without a size the centre square as it is",
    "none": "the whole image, by bicubic to a square of the size where one is given",
}
_EXIF_ORIENTATION = 274


@dataclass(frozen=True)
class View:
    """How an image is cut out and sized: ``crop`` is a key of ``CROPS``, ``size`` the side in pixels, None for as it is.

    Raises InputError for another crop, for a size below 1 and for "adm" without a size.
    """

    size: int | None = None
    crop: str = "none"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise InputError("--crop", f"got {self.crop!r}; one of {', '.join(CROPS)} works")
        if self.size is not None and self.size < 1:
            raise InputError("--size", f"got {self.size}; a side of 1 pixel or more works")
        if self.size is None and self.crop == "adm":
            raise InputError("--crop", "adm needs a size, for example --size 256")

    def __str__(self) -> str:
        return f"{self.crop} {self.size or 'as stored'}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """The part of ``image`` (RGB) that is looked at."""
        if self.crop == "adm":
            return _adm(image, self.size or 0)
        if self.crop == "center":
            return _center(image, self.size)
        if self.size is None or image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)


def _square(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _adm(image: Image.Image, size: int) -> Image.Image:
    """The rule of guided-diffusion's ``center_crop_arr``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _square(image, size, (image.width - size) // 2, (image.height - size) // 2)


def _center(image: Image.Image, size: int | None) -> Image.Image:
    short = min(image.size)
    if size is not None and short != size:
        # The long side is cut down to a whole number, as in torchvision's Resize.
        image = image.resize((image.width * size // short, image.height * size // short), Image.Resampling.BICUBIC)
    side = size or short
    return _square(image, side, round((image.width - side) / 2), round((image.height - side) / 2))


def kinds_of(image: Image.Image) -> list[str]:
    """Which of ``problems.NOTES`` apply to an image as it was opened."""
    found = []
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        found.append("16-bit grey")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        found.append("alpha")
    if image.mode == "CMYK":
        found.append("CMYK")
    if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        found.append("EXIF rotation")
    return found


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(content: bytes | np.ndarray[Any, Any], view: View) -> tuple[Tensor, list[str]]:
    """Pixels uint8 (3, H, W) of an encoded image, or of an array (H, W, 3) uint8, and the ``problems.NOTES`` that apply.

    Raises whatever the decoder raises for damaged content.
    """
    if isinstance(content, np.ndarray):
        image, kinds = Image.fromarray(content), list[str]()
        return to_tensor(view(image.convert("RGB"))), kinds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PIL's advice about transparent palettes: what is done stands in NOTES
        with Image.open(io.BytesIO(content)) as opened:
            kinds = kinds_of(opened)
            image = opened.convert("RGB")
    return to_tensor(view(image)), kinds
