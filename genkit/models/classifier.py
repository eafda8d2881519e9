"""A small CIFAR-10 classifier: the feature extractor that needs no download. What it yields is ``FD-CIFAR10``, never FID."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

BUILTIN = Path(__file__).resolve().parent.parent / "assets" / "cifar10" / "classifier.safetensors"
FORMAT = "genkit.classifier/1"


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a :class:`Classifier`. Stored beside the weights; every field is a plain value."""

    image_size: int = 32
    image_channels: int = 3
    num_classes: int = 10
    patch: int = 2  # side of the whitened patches that the fixed first layer sees
    channels: tuple[int, ...] = (32, 128, 128)  # one per block, each at half the resolution; the last is D
    logit_scale: float = 0.125  # keeps early logits small, so that a high learning rate is stable
    mean: tuple[float, ...] = (-0.017, -0.036, -0.107)  # of pixels in [-1, 1], per channel
    std: tuple[float, ...] = (0.494, 0.487, 0.523)

    def __post_init__(self) -> None:
        for name in ("channels", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        most = max(self.image_size - self.patch + 1, 1).bit_length() - 1
        if not 1 <= len(self.channels) <= most:
            raise ValueError(f"channels={self.channels}: give 1 to {most} entries; each block halves the image")
        if len(self.mean) != self.image_channels or len(self.std) != self.image_channels:
            raise ValueError(f"mean={self.mean} and std={self.std}: give image_channels={self.image_channels} entries each")


class Block(nn.Module):
    """Convolution, 2x2 max pooling, norm, GELU; then a residual convolution at the lower resolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))  # pooled before the norm: a quarter of the elementwise work
        return x + F.gelu(self.norm2(self.conv2(x)))


class Classifier(nn.Module):
    """Whitened patches, three blocks, global average pooling to a feature vector, one linear layer.

    Attributes:
        fingerprint: sha256 of the weights file, as hex; empty for a network that was not loaded from one.
        metadata: what that file says about itself (``test_accuracy``, ``dataset``, ...), as text.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ClassifierConfig()
        self.fingerprint = ""
        self.metadata: dict[str, str] = {}
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        width = 2 * config.image_channels * config.patch**2
        self.whiten = nn.Conv2d(config.image_channels, width, config.patch, bias=False).requires_grad_(False)
        self.blocks = nn.Sequential()
        for c in config.channels:
            self.blocks.append(Block(width, c))
            width = c
        self.head = nn.Linear(width, config.num_classes)

    @property
    def feature_size(self) -> int:
        return self.config.channels[-1]

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, D) of float images (B, C, H, W) in [-1, 1]; differentiable."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        h: Tensor = self.blocks(F.relu(self.whiten(x)))
        return h.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of float images (B, C, H, W) in [-1, 1]; differentiable."""
        out: Tensor = self.head(self.embed(x)) * self.config.logit_scale
        return out

    def features(self, images: Tensor) -> Tensor:
        """Global-pooled penultimate features.

        Args:
            images: (B, C, H, W) uint8 in [0, 255], any B including 0, at the network's own size: nothing is resized.

        Returns:
            (B, D) float32.

        Raises:
            ValueError: ``images`` has another type, dtype or shape.
        """
        return self.embed(self.pixels(images)).float()

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, num_classes), float32, before the softmax: the mean over the image and its mirror image.

        Two passes; ``self(x)`` is one. Arguments and errors as for :meth:`features`.
        """
        x = self.pixels(images)
        out: Tensor = (self(x) + self(x.flip(3))).float() / 2
        return out

    def pixels(self, images: Tensor) -> Tensor:
        """Checked uint8 images as floats in [-1, 1]."""
        c = self.config
        wanted = (c.image_channels, c.image_size, c.image_size)
        shape = f"(B, {', '.join(map(str, wanted))})"
        if not isinstance(images, Tensor):
            raise ValueError(f"images is a {type(images).__name__}; give a uint8 tensor {shape}")
        if images.dtype != torch.uint8:
            raise ValueError(f"images has dtype {images.dtype}; give uint8 in [0, 255] (`embed` takes floats in [-1, 1])")
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images has shape {tuple(images.shape)}; give {shape}: nothing is resized here")
        return images.to(self.head.weight.device, self.head.weight.dtype) / 127.5 - 1

    @torch.no_grad()
    def fit_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the fixed first layer to the whitening filters of ``images`` (B, C, H, W) uint8, and their negatives.

        Filter i is ``e_i / sqrt(lambda_i + eps)``, with e, lambda the eigenpairs of the patch covariance.
        """
        k, c = self.config.patch, self.config.image_channels
        x = (self.pixels(images) - self.mean) / self.std
        patches = x.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, c * k * k).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, c, k, k)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def load_classifier(path: str | Path) -> Classifier:
    """Read a classifier from a ``.safetensors`` file that :mod:`genkit.training.cifar10_classifier` exported.

    Returns:
        The network in float32 and evaluation mode, its parameters frozen, with ``fingerprint`` and ``metadata`` set.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is not such a checkpoint, does not fit its own configuration, or holds values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give an exported classifier (.safetensors)")
    raw = path.read_bytes()
    try:
        tensors = load_tensors(raw)
    except SafetensorError as e:
        raise ValueError(f"path={str(path)!r} is not a readable safetensors file ({e}); export it again") from None
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path={str(path)!r} has format={metadata.get('format')!r}; a classifier has {FORMAT!r}")
    bad = sorted(name for name, t in tensors.items() if not torch.isfinite(t).all())
    if bad:
        raise ValueError(f"path={str(path)!r} holds NaN or infinite values in {bad[:3]}; export it again")
    try:
        net = Classifier(ClassifierConfig(**json.loads(metadata["config"])))
        missing = net.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"path={str(path)!r} does not fit the configuration it carries: {e}") from None
    lost = [k for k in missing.missing_keys if not k.endswith("num_batches_tracked")] + missing.unexpected_keys
    if lost:
        raise ValueError(f"path={str(path)!r} does not fit the configuration it carries: {lost[:3]} missing or unexpected")
    net.fingerprint, net.metadata = hashlib.sha256(raw).hexdigest(), metadata
    net.requires_grad_(False)
    return net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_builtin() -> Classifier:
    """The CIFAR-10 classifier shipped with genkit: 128 features; its test accuracy is ``metadata["test_accuracy"]``."""
    return load_classifier(BUILTIN)
