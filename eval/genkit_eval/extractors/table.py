"""The extractors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from genkit_eval.errors import InputError
from genkit_eval.extractors import clip, inception
from genkit_eval.extractors.base import Extractor, Options
from genkit_eval.extractors.builtin import CIFAR10, load_cifar10
from genkit_eval.extractors.combined import combine
from genkit_eval.extractors.custom import load_custom
from genkit_eval.extractors.dinov2 import MODELS, load_dinov2

Given = str | Path | Sequence[str] | None

EXTRACTORS: dict[str, Callable[[Options], Extractor]] = {
    CIFAR10: load_cifar10,
    inception.NAME: inception.load_inception,
    **{f"dinov2-vit-{size}-14": partial(load_dinov2, size) for size in MODELS},
    clip.NAME: clip.load_clip,
}


def load_extractor(
    name: str,
    device: str = "cpu",
    weights: Given = None,
    resize: Given = None,
    any_weights: bool = False,
) -> Extractor:
    """The extractor ``name`` of ``EXTRACTORS``, of an entry point, or made by ``package.module:factory``; ``a+b``: both in one.

    Args:
        device: where the network runs.
        weights: a file in place of the published one, which is fetched on first use; of several extractors, ``name=file`` for
            each, where the start of the name will do.
        resize: a rule in place of the extractor's first; as ``weights``.
        any_weights: take a weights file with another hash; name and label then carry the start of it.

    Raises InputError for an unknown name or rule, and for weights that cannot be had or read.
    """
    names = [part.strip() for part in name.split("+")]
    files, rules = by_name(names, weights, "--weights"), by_name(names, resize, "--resize")
    found = []
    for one in names:
        file = files.get(one)
        found.append(_load(one, Options(device, None if file is None else Path(file), rules.get(one), any_weights)))
    return found[0] if len(found) == 1 else combine(found)


def by_name(names: Sequence[str], given: Given, option: str) -> dict[str, str]:
    """Values by the name of the extractor that each is for: ``NAME=VALUE``, or else the first one that has none yet.

    Raises InputError for more values than extractors, and two for one.
    """
    values = [] if given is None else [str(given)] if isinstance(given, str | Path) else [str(value) for value in given]
    found: dict[str, str] = {}
    for value in values:
        start, said, rest = value.partition("=")
        meant = [name for name in names if said and start and name.startswith(start)]
        owner = meant[0] if len(meant) == 1 else next((name for name in names if name not in found), None)
        if owner is None or owner in found:
            raise InputError(option, f"got {', '.join(values)} for {'+'.join(names)}; one for each, as NAME=VALUE, works")
        found[owner] = rest if len(meant) == 1 else value
    return found


def _load(name: str, options: Options) -> Extractor:
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
