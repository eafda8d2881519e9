"""Your own network: any ``nn.Module``, by Python, by ``package.module:factory``, or by an entry point."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from genkit_eval.errors import InputError
from genkit_eval.extractors.base import MAIN, Extractor, Options
from genkit_eval.extractors.resize import RULES, Preprocess

GROUP = "genkit.extractors"


def state_sha256(net: nn.Module, *more: str) -> str:
    """SHA-256 over the names and values of parameters and buffers, the class, and ``more``."""
    digest = hashlib.sha256("\n".join([type(net).__qualname__, *more]).encode())
    for name, value in sorted(net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def from_module(
    net: nn.Module,
    name: str,
    *,
    label: str | None = None,
    size: int | None = None,
    resize: str = "clean",
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: str = "cpu",
    batch: int = 64,
) -> Extractor:
    """An extractor of any network that takes float32 images (B, 3, H, W).

    The network sees ``(x - mean) / std`` of images x in [0, 1], and returns (B, D), or a dict of such with the main one under
    "features". It is put into evaluation mode and on ``device``.

    Args:
        name: recorded with every number.
        label: in metric titles, ``FD-<label>``; None is the name.
        size: side of the images that the network takes; None leaves them as they are.
        resize: rule of ``genkit_eval.extractors.resize.RULES``, where ``size`` is given.
        mean, std: per channel, in the scale of [0, 1].
        batch: images at once.

    Raises:
        InputError: an unknown resize rule.
    """
    if resize not in RULES:
        raise InputError("--resize", f"got {resize!r}; one of {', '.join(RULES)} works")
    rule = "none" if size is None else resize
    low, wide = (tuple(255 * value for value in values) for values in (mean, std))
    prepare = Preprocess(rule, size, (low[0], low[1], low[2]), (wide[0], wide[1], wide[2]))
    net = net.eval().to(device)

    def features(pixels: Tensor) -> Tensor | Mapping[str, Tensor]:
        found = net(prepare(pixels))
        main = found.get(MAIN) if isinstance(found, Mapping) else found
        if not isinstance(main, Tensor) or main.ndim != 2 or len(main) != len(pixels):
            got = tuple(main.shape) if isinstance(main, Tensor) else type(found).__name__
            raise ValueError(
                f"extractor {name} returned {got} for {len(pixels)} images; (B, D), or a dict of such with 'features'"
            )
        return found  # type: ignore[no-any-return]

    sha256 = state_sha256(net, repr(mean), repr(std), str(size))
    return Extractor(name, label or name, sha256, rule, features, variant=f"{name}-{rule}", device=device, batch=batch)


def load_custom(name: str, options: Options) -> Extractor | None:
    """What ``package.module:factory`` or an entry point of the group ``genkit.extractors`` makes; None where ``name`` is neither.

    The factory is given the :class:`Options` if it has an argument ``options``, and returns an :class:`Extractor`, or an
    ``nn.Module``, for which :func:`from_module` is called.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}.get(name)
    if found is None and ":" not in name:
        return None
    try:
        factory = found.load() if found is not None else _import(name)
        made = factory(options=options) if "options" in inspect.signature(factory).parameters else factory()
    except InputError:
        raise
    except Exception as error:  # whatever a plug-in raises, its name belongs into the message
        raise InputError("--extractor", f"{name} cannot be loaded ({type(error).__name__}: {error})") from error
    if isinstance(made, nn.Module):
        if options.weights is not None:
            raise InputError("--weights", f"{name} makes a module with weights of its own; let its factory take the Options")
        made = from_module(made, name, device=options.device)
    if not isinstance(made, Extractor):
        raise InputError("--extractor", f"{name} made a {type(made).__name__}; an nn.Module or an Extractor works")
    if options.resize not in (None, made.resize):
        raise InputError("--resize", f"got {options.resize!r}; {name} has the rule {made.resize!r}, leave it out")
    return made


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
