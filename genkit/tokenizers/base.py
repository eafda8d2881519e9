"""What all image tokenizers have in common."""

from __future__ import annotations

import os
from typing import ClassVar, Self

from torch import Tensor, nn

from genkit.tokenizers.quantizers import Quantizer
from genkit.weights import fit, read_weights


class Tokenizer(nn.Module):
    """Images to indices and back: ``features``, then the quantizer; its codes, then ``decode_features``.

    Attributes:
        quantize: the quantizer.
        parts, prefix, ignore, optional: where its weights lie in the files they come in; see :mod:`genkit.weights`.
    """

    quantize: Quantizer
    parts: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""
    ignore: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def features(self, image: Tensor) -> Tensor:
        """The latent (B, d, h, w), before it is quantized, of images (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode_features(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, d, h, w): [-1, 1], and beyond where the decoder overshoots."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> Tensor:
        """Indices (B, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self.quantize.encode(self.features(image)).indices

    def decode(self, indices: Tensor) -> Tensor:
        """Images (B, 3, H, W) of indices (B, h, w), or (B, n) for a square grid.

        Raises:
            ValueError: n is not a square.
        """
        if indices.ndim == 2:
            side = round(indices.shape[1] ** 0.5)
            if side * side != indices.shape[1]:
                raise ValueError(f"indices has {indices.shape[1]} tokens a row, not a square; give shape (B, h, w)")
            indices = indices.unflatten(1, (side, side))
        codes = self.quantize.codes(indices).to(next(self.parameters()).dtype)
        return self.decode_features(codes.movedim(-1, 1))

    def load_state(self, path: str | os.PathLike[str]) -> Self:
        """Read the weights of a checkpoint into this tokenizer, and put it in evaluation mode.

        Args:
            path: ``.safetensors``, or a pickle of plain tensors, bare or in one of the wrappers of the official trainings.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, needs code to load, does not fit (the first keys are named), or holds NaN.
        """
        weights = read_weights(path, parts=self.parts, prefix=self.prefix)
        fit(self, weights, path, optional=self.optional, ignore=self.ignore, what=f"this {type(self).__name__}")
        return self.eval()
