"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021), in the key layouts of VAR and of LlamaGen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import attention


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, x through a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class Attention(nn.Module):
    """Self-attention with one head over all positions, added to its input. ``fused``: q, k and v from one convolution."""

    attention_backend: str | None = None

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.norm, self.proj_out = norm(channels), nn.Conv2d(channels, channels, 1)
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        qkv = self.qkv(h).chunk(3, 1) if hasattr(self, "qkv") else (self.q(h), self.k(h), self.v(h))
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in qkv)
        h = attention(q, k, v, default=self.attention_backend)[:, 0].transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out


class Downsample(nn.Module):
    """Convolution with stride 2, padded at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


@dataclass(frozen=True)
class Layout:
    """Names in the state dict: of the levels, of a level's blocks, of the three modules in the middle."""

    down: str
    up: str
    blocks: str
    mid: tuple[str, str, str]
    fused: bool  # q, k, v as one convolution
    up_reversed: bool  # the decoder's levels are numbered from the highest resolution, the last one that runs


VAR = Layout("down", "up", "block", ("block_1", "attn_1", "block_2"), fused=True, up_reversed=True)
LLAMAGEN = Layout("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), fused=False, up_reversed=False)


@dataclass(frozen=True)
class VQGANConfig:
    """Shape of an encoder and its decoder.

    Args:
        channels: width at full resolution, a multiple of 32.
        multipliers: of the width, one for each resolution, each half the one before.
        blocks: residual blocks for each resolution; the decoder has one more.
        z_channels: width of the latent.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    z_channels: int

    def __post_init__(self) -> None:
        if self.channels % 32 or not self.multipliers or self.blocks < 1:
            raise ValueError(f"{self}: give channels that 32 divides, at least one multiplier and at least one block")


class Level(nn.ModuleDict):
    """The blocks of one resolution, each followed by its attention where there is one, then the change of resolution."""

    def __init__(
        self, name: str, blocks: Iterable[nn.Module], attentions: Iterable[nn.Module] = (), **resample: nn.Module
    ) -> None:
        super().__init__({name: nn.ModuleList(blocks), "attn": nn.ModuleList(attentions), **resample})

    def forward(self, h: Tensor) -> Tensor:
        blocks, attentions, *resample = self.values()
        for block, attend in zip_longest(blocks.children(), attentions.children()):
            h = block(h) if attend is None else attend(block(h))
        for module in resample:
            h = module(h)
        return h


class Coder(nn.Module):
    """What encoder and decoder share: levels of blocks (with attention at the lowest resolution), and the middle."""

    mid: nn.ModuleDict
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def _level(self, c_in: int, c_out: int, count: int, attention: bool, **resample: nn.Module) -> Level:
        blocks = [ResBlock(c_in if i == 0 else c_out, c_out) for i in range(count)]
        attentions = [Attention(c_out, self.layout.fused) for _ in range(count * attention)]
        return Level(self.layout.blocks, blocks, attentions, **resample)

    def _middle(self, c: int) -> nn.ModuleDict:
        modules = (ResBlock(c, c), Attention(c, self.layout.fused), ResBlock(c, c))
        return nn.ModuleDict(dict(zip(self.layout.mid, modules, strict=True)))

    def _out(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Encoder(Coder):
    """Images (B, 3, H, W) to latents (B, z_channels, H / f, W / f)."""

    def __init__(self, config: VQGANConfig, layout: Layout) -> None:
        super().__init__(layout)
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        levels, before, last = {}, config.channels, len(widths) - 1
        for i, width in enumerate(widths):
            resample = {} if i == last else {"downsample": Downsample(width)}
            levels[str(i)] = self._level(before, width, config.blocks, i == last, **resample)
            before = width
        self.add_module(layout.down, nn.ModuleDict(levels))
        self.mid = self._middle(before)
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.get_submodule(self.layout.down).children():
            h = level(h)
        for module in self.mid.values():
            h = module(h)
        return self._out(h)


class Decoder(Coder):
    """Latents (B, z_channels, h, w) to images (B, 3, h f, w f)."""

    def __init__(self, config: VQGANConfig, layout: Layout) -> None:
        super().__init__(layout)
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = self._middle(widths[0])
        levels, before, last = {}, widths[0], len(widths) - 1
        for i, width in enumerate(widths):
            resample = {} if i == last else {"upsample": Upsample(width)}
            level = self._level(before, width, config.blocks + 1, i == 0, **resample)
            levels[str(last - i if layout.up_reversed else i)] = level
            before = width
        self.add_module(layout.up, nn.ModuleDict(levels))  # holds them in the order they run, whatever their names
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for module in self.mid.values():
            h = module(h)
        for level in self.get_submodule(self.layout.up).children():
            h = level(h)
        return self._out(h)
