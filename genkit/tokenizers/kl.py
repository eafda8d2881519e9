"""The autoencoder of latent diffusion with a Gaussian latent (Rombach et al. 2022), as MAR trained it: KL-16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from genkit.tokenizers.base import Tokenizer
from genkit.tokenizers.vqgan import Decoder, Encoder, Layout, VQGANConfig

LDM = Layout("down", "up", "block", ("block_1", "attn_1", "block_2"), fused=False, up_reversed=True)


@dataclass(frozen=True)
class KLConfig:
    """Shape of a :class:`KLAutoencoder`.

    Args:
        channels, multipliers, blocks, z_channels: see :class:`genkit.tokenizers.vqgan.VQGANConfig`.
        scale: what latents are multiplied by.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    z_channels: int = 16
    scale: float = 0.2325


class KLAutoencoder(Tokenizer):
    """Images (B, 3, H, W) as latents (B, z_channels, H / 16, W / 16) of about unit variance; there are no indices.

    Args:
        config: default is KL-16 with the scale of MAR and FlowAR.
    """

    ignore: ClassVar[tuple[str, ...]] = ("loss.",)

    def __init__(self, config: KLConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or KLConfig()
        self.encoder = Encoder(VQGANConfig(c.channels, c.multipliers, c.blocks, 2 * c.z_channels), LDM)
        self.decoder = Decoder(VQGANConfig(c.channels, c.multipliers, c.blocks, c.z_channels), LDM)
        self.quant_conv = nn.Conv2d(2 * c.z_channels, 2 * c.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.z_channels, c.z_channels, 1)

    def features(self, image: Tensor) -> Tensor:
        """The scaled mean (B, z_channels, h, w) of the latent's Gaussian."""
        mean: Tensor = self.quant_conv(self.encoder(image)).chunk(2, 1)[0]
        return mean * self.config.scale

    def decode_features(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(z / self.config.scale))
        return out
