"""VAR's tokenizer: a VQGAN around the multi-scale residual quantizer (Tian et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from genkit.tokenizers.base import Tokenizer
from genkit.tokenizers.multiscale import MultiScaleVQ
from genkit.tokenizers.vqgan import VAR, Decoder, Encoder, VQGANConfig


@dataclass(frozen=True)
class VARTokenizerConfig:
    """Shape of a :class:`VARTokenizer`.

    Args:
        size, dim: V codes of C values.
        channels, multipliers, blocks: of the encoder, see :class:`genkit.tokenizers.vqgan.VQGANConfig`.
        patch_nums: sides of the scales, the last one that of the latent.
        share: convolutions phi that the scales share.
    """

    size: int = 4096
    dim: int = 32
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    share: int = 4


#: Both are read from the same file, vae_ch160v4096z32.pth.
VAR_TOKENIZERS = {
    "256": VARTokenizerConfig(),
    "512": VARTokenizerConfig(patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
}


class VARTokenizer(Tokenizer):
    """Images (B, 3, H, H) as indices (B, L) of all scales, the smallest first.

    Args:
        config: default is the released one at 256 pixels.
    """

    quantize: MultiScaleVQ
    parts: ClassVar[tuple[str, ...]] = ("vae_local",)  # in files of VAR's training

    def __init__(self, config: VARTokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or VARTokenizerConfig()
        shape = VQGANConfig(c.channels, c.multipliers, c.blocks, c.dim)
        self.encoder, self.decoder = Encoder(shape, VAR), Decoder(shape, VAR)
        self.quantize = MultiScaleVQ(c.size, c.dim, c.patch_nums, share=c.share)
        self.quant_conv = nn.Conv2d(c.dim, c.dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(c.dim, c.dim, 3, padding=1)

    def features(self, image: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(self.encoder(image))
        return out

    def decode_features(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, H), clamped to [-1, 1], of latents f_hat (B, C, P, P)."""
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out.clamp(-1, 1)

    def decode(self, indices: Tensor) -> Tensor:
        """Images (B, 3, H, H) in [-1, 1] of indices (B, L), or of a prefix of them that ends with a scale."""
        return self.decode_features(self.quantize.f_hats(indices)[-1])
