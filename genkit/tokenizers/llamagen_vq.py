"""LlamaGen's tokenizers: a VQGAN around a codebook on the unit sphere (Sun et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkit.tokenizers.base import Tokenizer
from genkit.tokenizers.quantizers import VectorQuantizer
from genkit.tokenizers.vqgan import LLAMAGEN, Decoder, Encoder, VQGANConfig


@dataclass(frozen=True)
class LlamaGenTokenizerConfig:
    """Shape of a :class:`LlamaGenTokenizer`.

    Args:
        size, dim: V codes of d values.
        channels, multipliers, blocks, z_channels: see :class:`genkit.tokenizers.vqgan.VQGANConfig`.
        l2_norm: latents and codes have norm 1.
    """

    size: int = 16384
    dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    z_channels: int = 256
    l2_norm: bool = True


#: VQ-16 is vq_ds16_c2i.pt and vq_ds16_t2i.pt, VQ-8 is vq_ds8_c2i.pt.
LLAMAGEN_TOKENIZERS = {
    "VQ-16": LlamaGenTokenizerConfig(),
    "VQ-8": LlamaGenTokenizerConfig(multipliers=(1, 2, 2, 4)),
}


class LlamaGenTokenizer(Tokenizer):
    """Images (B, 3, H, W) as indices (B, H / 16, W / 16), or H / 8 and W / 8.

    Args:
        config: default is VQ-16.
    """

    optional: ClassVar[tuple[str, ...]] = ("quantize.codebook_used",)

    def __init__(self, config: LlamaGenTokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or LlamaGenTokenizerConfig()
        shape = VQGANConfig(c.channels, c.multipliers, c.blocks, c.z_channels)
        self.encoder, self.decoder = Encoder(shape, LLAMAGEN), Decoder(shape, LLAMAGEN)
        self.quantize = VectorQuantizer(c.size, c.dim, l2_norm=c.l2_norm)
        # Part of the official layout: the last indices of training. Nothing here reads them.
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv = nn.Conv2d(c.z_channels, c.dim, 1)
        self.post_quant_conv = nn.Conv2d(c.dim, c.z_channels, 1)

    def features(self, image: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(self.encoder(image))
        return out

    def decode_features(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out
