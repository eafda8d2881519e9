"""Small tokenizers for small images: a few convolutions around any of the quantizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.tokenizers.base import Tokenizer
from genkit.tokenizers.multiscale import MultiScale, MultiScaleVQ
from genkit.tokenizers.quantizers import LFQ, Quantizer, SimVQ, VectorQuantizer
from genkit.tokenizers.vqgan import ResBlock, norm


@dataclass(frozen=True)
class CompactConfig:
    """Shape of a :class:`CompactTokenizer`.

    Args:
        quantizer: a key of :data:`QUANTIZERS`.
        size, dim: V codes of d values; for ``"lfq"`` V must be 2^d.
        channels: width at half the resolution, a multiple of 32; twice that at a quarter.
        blocks: residual blocks for each resolution; the decoder has one more at the lowest.
        image_size: side of the images, a multiple of 4.
        patch_nums: for ``"multiscale"``, sides of the scales; the last one is image_size / 4.
    """

    quantizer: str = "simvq"
    size: int = 1024
    dim: int = 16
    channels: int = 64
    blocks: int = 1
    image_size: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 5, 8)

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer={self.quantizer!r}: use one of {', '.join(QUANTIZERS)}")
        if self.quantizer == "lfq" and self.size != 2**self.dim:
            raise ValueError(f"size={self.size}, dim={self.dim}: lfq has 2^dim codes; give size={2**self.dim}")
        if self.channels % 32 or self.blocks < 1 or self.image_size % 4 or self.image_size < 4:
            raise ValueError(f"{self}: give channels that 32 divides, blocks >= 1 and an image_size that 4 divides")
        if self.quantizer == "multiscale" and self.patch_nums[-1] != self.side:
            raise ValueError(f"patch_nums={self.patch_nums}: the last side must be {self.side}, a quarter of image_size")

    @property
    def side(self) -> int:
        """Height and width of the latent."""
        return self.image_size // 4


#: How a configuration's quantizer is made.
QUANTIZERS: dict[str, Callable[[CompactConfig], Quantizer]] = {
    "vq": lambda c: VectorQuantizer(c.size, c.dim),
    "simvq": lambda c: SimVQ(c.size, c.dim),
    "lfq": lambda c: LFQ(c.dim),
    "multiscale": lambda c: MultiScaleVQ(c.size, c.dim, c.patch_nums),
}


class CompactTokenizer(Tokenizer):
    """Images (B, 3, H, H) as indices (B, H / 4, H / 4), or (B, L) of all scales, the smallest first.

    Pixels enter and leave in blocks of 2 by 2, so that no convolution runs at full resolution.

    Args:
        config: default is SimVQ with 1024 codes for 32 x 32 pixels.
    """

    def __init__(self, config: CompactConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CompactConfig()
        w = c.channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, w, 3, padding=1),
            *(ResBlock(w, w) for _ in range(c.blocks)),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),
            *(ResBlock(2 * w, 2 * w) for _ in range(c.blocks)),
            norm(2 * w),
            nn.SiLU(),
            nn.Conv2d(2 * w, c.dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c.dim, 2 * w, 3, padding=1),
            *(ResBlock(2 * w, 2 * w) for _ in range(c.blocks + 1)),
            nn.Conv2d(2 * w, 4 * w, 1),
            nn.PixelShuffle(2),
            *(ResBlock(w, w) for _ in range(c.blocks)),
            norm(w),
            nn.SiLU(),
            nn.Conv2d(w, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.quantize = QUANTIZERS[c.quantizer](c)

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.quantize.length if isinstance(self.quantize, MultiScale) else self.config.side**2

    def features(self, image: Tensor) -> Tensor:
        out: Tensor = self.encoder(image)
        return out

    def decode_features(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out

    def decode(self, indices: Tensor) -> Tensor:
        """Images of indices (B, h, w) or (B, h w); multi-scale: (B, L), or a prefix that ends with a scale."""
        if isinstance(self.quantize, MultiScale):
            return self.decode_features(self.quantize.f_hats(indices)[-1])
        return super().decode(indices)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One training pass: loss ``mse(decoded, image) + sum of the quantizer's losses``, the first term, indices, latent."""
        z = self.features(image)
        q = self.quantize.encode(z)
        distortion = F.mse_loss(self.decode_features(q.z_q).float(), image)
        loss = distortion + sum(q.losses.values(), torch.zeros_like(distortion))
        return loss, distortion, q.indices, z
