"""A classifier of minority levels over noisy images: what ``MinorityGuidance`` of the built-in model follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path as File

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.models.classifier import Classifier
from genkit.models.unet import NoiseEmbedding, ResBlock
from genkit.noise import VE, Path

FORMAT = "genkit.minority/1"


@dataclass(frozen=True)
class MinorityConfig:
    """Shape of a :class:`MinorityClassifier`. Stored beside the weights; every field is a plain value."""

    image_size: int = 32
    image_channels: int = 3
    levels: int = 10
    patch: int = 2  # pixels are unshuffled by this factor before the first convolution
    channels: tuple[int, ...] = (32, 64, 128)  # one entry per resolution, each half the one before
    embedding: int = 128
    groups: int = 16
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.levels < 2:
            raise ValueError(f"levels={self.levels}: use at least 2")
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels={self.channels} must all be divisible by groups={self.groups}")


class MinorityClassifier(nn.Module):
    """``log p(level | x)`` of noisy images ``x = x0 + sigma n``: residual blocks, average pooling, one linear layer.

    Attributes:
        levels: how many; 0 are the most common images, ``levels - 1`` the rarest.
        metadata: what its file says about itself, as text.
    """

    path: Path = VE

    def __init__(self, config: MinorityConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or MinorityConfig()
        self.metadata: dict[str, str] = {}
        self.noise = NoiseEmbedding(c.embedding)
        self.stem = nn.Conv2d(c.image_channels * c.patch**2, c.channels[0], 3, padding=1)
        widths = list(zip((c.channels[0], *c.channels), c.channels, strict=False))
        self.blocks = nn.ModuleList([ResBlock(before, after, c.embedding, c.groups) for before, after in widths])
        self.norm = nn.LayerNorm(c.channels[-1])  # after the pooling: norms over the image would hide its brightness and contrast
        self.head = nn.Linear(c.channels[-1], c.levels)

    @property
    def levels(self) -> int:
        return self.config.levels

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Scores (B, levels) before the softmax, of x (B, C, H, W) with noise levels sigma (B,)."""
        c, s = self.config, sigma.to(x.dtype)[:, None, None, None]
        emb = F.silu(self.noise(sigma.float().log() / 4))
        h = self.stem(F.pixel_unshuffle((x * (s.square() + c.sigma_data**2).rsqrt()).float(), c.patch))
        for i, block in enumerate(self.blocks):
            h = block(F.avg_pool2d(h, 2) if i else h, emb)
        out: Tensor = self.head(self.norm(F.silu(h).mean((2, 3))))
        return out

    def forward(self, x: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        """``log p(level | x)`` (B,), of integer levels (B,)."""
        return self.logits(x, sigma).float().log_softmax(1).gather(1, level[:, None])[:, 0].to(x.dtype)


def feature_distance(classifier: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
    """``|f(a) - f(b)|`` (B,) in the features of a classifier, of float images (B, C, H, W) clipped to [-1, 1]."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(classifier.embed(a.clamp(-1, 1)) - classifier.embed(b.clamp(-1, 1)), dim=1)
        return norm

    return distance


def save_minority(path: File, net: MinorityClassifier, about: dict[str, str]) -> None:
    """Write the weights in half precision, with the configuration and ``about``."""
    weights = {key: value.detach().half().cpu().contiguous() for key, value in net.state_dict().items()}
    save_file(weights, path, {"format": FORMAT, "config": json.dumps(asdict(net.config)), **about})


def load_minority(path: File) -> MinorityClassifier:
    """Read a classifier that :mod:`genkit.training.minority` exported: float32, evaluation mode, parameters frozen.

    Raises:
        ValueError: the file is not such a checkpoint, does not fit its own configuration, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is not a readable safetensors file ({error}); export it again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path={str(path)!r} has format={metadata.get('format')!r}; a minority classifier has {FORMAT!r}")
    bad = sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all()))
    if bad:
        raise ValueError(f"path={str(path)!r} holds NaN or infinite values in {bad[:3]}; export it again")
    try:
        net = MinorityClassifier(MinorityConfig(**json.loads(metadata["config"])))
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} does not fit the configuration it carries: {error}") from None
    net.metadata = metadata
    return net.eval().requires_grad_(False)
