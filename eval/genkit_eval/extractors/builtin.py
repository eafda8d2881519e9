"""The network that comes with genkit."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from genkit_eval.extractors.base import MAIN, Extractor, Options

CIFAR10 = "builtin/cifar10"


def load_cifar10(options: Options) -> Extractor:
    """The CIFAR-10 classifier's last features: a few seconds for thousands of images, and no FID."""
    import genkit.models.classifier as classifier

    options.only_device(CIFAR10)
    net = classifier.load_builtin()
    assert isinstance(net, nn.Module)
    net.eval().to(options.device)
    reference = Path(classifier.__file__).parents[1] / "assets" / "cifar10" / "reference.safetensors"
    shape = (net.config.image_channels, net.config.image_size, net.config.image_size)
    resize = "none (32x32 as generated)"
    width = net.config.channels[-1]
    name, device = "cifar10", options.device
    return Extractor(
        CIFAR10, "CIFAR10", str(net.fingerprint), resize, net.features, reference, shape, {MAIN: width}, name, device=device
    )
