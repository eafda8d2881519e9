"""Open-MAGVIT2's tokenizer: look-up free quantization, and a decoder modulated by the latent's statistics (Luo et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from genkit.tokenizers.base import Tokenizer
from genkit.tokenizers.quantizers import LFQ
from genkit.tokenizers.vqgan import Level, ResBlock, norm


@dataclass(frozen=True)
class OpenMAGVIT2TokenizerConfig:
    """Shape of an :class:`OpenMAGVIT2Tokenizer`.

    Args:
        bits: channels of the latent; there are 2^bits codes.
        parts: bits of the sub-tokens that an autoregressive model predicts one after the other.
        channels: width at full resolution, a multiple of 32.
        multipliers: of the width, one for each resolution, each half the one before.
        blocks: residual blocks for each resolution and in the middle.
    """

    bits: int = 18
    parts: tuple[int, ...] = (6, 12)
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 4


OPEN_MAGVIT2_TOKENIZERS = {"imagenet_256_L": OpenMAGVIT2TokenizerConfig()}


def _blocks(c_in: int, c_out: int, count: int) -> list[ResBlock]:
    return [ResBlock(c_in if i == 0 else c_out, c_out, bias=False) for i in range(count)]


class AdaptiveNorm(nn.Module):
    """``norm(x) gamma(std) + beta(mean)``, with standard deviation and mean of the latent's channels over all positions."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(bits, channels), nn.Linear(bits, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.gamma((z.var((2, 3)) + 1e-6).sqrt()), self.beta(z.mean((2, 3)))
        out: Tensor = scale[..., None, None] * self.gn(x) + shift[..., None, None]
        return out


class DepthToSpace(nn.Module):
    """Twice the resolution from four times the channels, which hold (row, column, channel) in this order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        out: Tensor = self.conv1(x).view(b, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * w)
        return out


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, bits, H / f, W / f)."""

    def __init__(self, config: OpenMAGVIT2TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down, before = nn.ModuleList(), config.channels
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            resample: dict[str, nn.Module] = {} if last else {"downsample": nn.Conv2d(width, width, 3, stride=2, padding=1)}
            self.down.append(Level("block", _blocks(before, width, config.blocks), (), **resample))
            before = width
        self.mid_block = nn.Sequential(*_blocks(before, before, config.blocks))
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, config.bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid_block(h))))
        return out


class Decoder(nn.Module):
    """Latents (B, bits, h, w) to images (B, 3, h f, w f)."""

    def __init__(self, config: OpenMAGVIT2TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        after = [*widths[1:], widths[-1]]  # the width that a level gets from the one below
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid_block = nn.Sequential(*_blocks(widths[-1], widths[-1], config.blocks))
        self.adaptive = nn.ModuleList([AdaptiveNorm(config.bits, width) for width in after])
        self.up = nn.ModuleList()  # from the highest resolution; run from the lowest
        for i, (before, width) in enumerate(zip(after, widths, strict=True)):
            resample: dict[str, nn.Module] = {"upsample": DepthToSpace(width)} if i else {}
            self.up.append(Level("block", _blocks(before, width, config.blocks), (), **resample))
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for adapt, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            h = level(adapt(h, z))
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class OpenMAGVIT2Tokenizer(Tokenizer):
    """Images (B, 3, H, W) as indices (B, H / 16, W / 16) of 18 bits; ``quantize.split`` gives the sub-tokens.

    Args:
        config: default is the released one at 256 pixels.
    """

    quantize: LFQ
    prefix: ClassVar[str] = "first_stage_model."  # in files of the autoregressive model
    ignore: ClassVar[tuple[str, ...]] = ("loss.", "model_ema.")

    def __init__(self, config: OpenMAGVIT2TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or OpenMAGVIT2TokenizerConfig()
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quantize = LFQ(c.bits, parts=c.parts)

    def features(self, image: Tensor) -> Tensor:
        out: Tensor = self.encoder(image)
        return out

    def decode_features(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out
