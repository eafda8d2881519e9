"""The extractors by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from genkit_eval.errors import InputError
from genkit_eval.extractors import clip, inception
from genkit_eval.extractors.base import Extractor, Options
from genkit_eval.extractors.builtin import CIFAR10, load_cifar10
from genkit_eval.extractors.custom import load_custom
from genkit_eval.extractors.dinov2 import MODELS, load_dinov2

EXTRACTORS: dict[str, Callable[[Options], Extractor]] = {
    CIFAR10: load_cifar10,
    inception.NAME: inception.load_inception,
    **{f"dinov2-vit-{size}-14": partial(load_dinov2, size) for size in MODELS},
    clip.NAME: clip.load_clip,
}


def load_extractor(
    name: str, device: str = "cpu", weights: Path | None = None, resize: str | None = None, any_weights: bool = False
) -> Extractor:
    """The extractor ``name`` of ``EXTRACTORS``, of an entry point, or made by ``package.module:factory``.

    Args:
        device: where the network runs.
        weights: a file in place of the published one, which is fetched on first use.
        resize: a rule in place of the extractor's first.
        any_weights: take a weights file with another hash; name and label then carry the start of it.

    Raises InputError for an unknown name or rule, and for weights that cannot be had or read.
    """
    options = Options(device, weights, resize, any_weights)
    try:
        found = EXTRACTORS[name](options) if name in EXTRACTORS else load_custom(name, options)
    except InputError:
        raise
    except ImportError as error:
        raise InputError("--extractor", f"{name}: {error}; pip install 'genkit-image[diffusers]'") from None
    except (OSError, ValueError) as error:
        raise InputError("--extractor", f"{name}: {error}") from None
    if found is None:
        known = ", ".join(EXTRACTORS)
        raise InputError("--extractor", f"got {name!r}; one of {known} works, or package.module:factory for your own")
    return found
