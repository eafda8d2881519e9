"""The files that genkit's own autoregressive recipes write: one network each, in half precision, described in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from genkit.files import write_atomically
from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VARConfig
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.weights import fit, read_safetensors

#: Network and configuration by the format that the header names.
FORMATS: dict[str, tuple[Any, Any]] = {
    "genkit-tokenizer-1": (CompactTokenizer, CompactConfig),
    "genkit-next-token-1": (LlamaGen, LlamaGenConfig),
    "genkit-next-scale-1": (VAR, VARConfig),
    "genkit-drafter-1": (EagleHead, EagleConfig),
}


def save_exported(path: Path, network: nn.Module, extra: Mapping[str, Any] | None = None) -> None:
    """Write a network in half precision, with its configuration, by way of a temporary file.

    Args:
        network: of one of the classes in :data:`FORMATS`.
        extra: further plain values for the header (recipe, hardware, ...).

    Raises:
        ValueError: another class.
    """
    names = [name for name, (kind, _) in FORMATS.items() if type(network) is kind]
    if not names:
        known = ", ".join(kind.__name__ for kind, _ in FORMATS.values())
        raise ValueError(f"network is a {type(network).__name__}; files are written for {known}")
    weights = {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in network.state_dict().items()
    }
    about = {"network": asdict(network.config), **(extra or {})}  # type: ignore[call-overload]
    metadata = {"format": names[0], "config": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


def described(path: str | os.PathLike[str], metadata: Mapping[str, str], *formats: str) -> tuple[Any, Any, dict[str, Any]]:
    """The class of an exported network, its configuration, and all that the file's header says.

    Raises:
        ValueError: none of the formats, or a damaged description.
    """
    found, wanted = metadata.get("format"), formats or tuple(FORMATS)
    if found not in wanted:
        raise ValueError(f"path={str(path)!r} says format={found!r}; needed is {' or '.join(map(repr, wanted))}")
    kind, config = FORMATS[found]
    try:
        about: dict[str, Any] = json.loads(metadata["config"])
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in about["network"].items()}
        return kind, config(**values), about
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path={str(path)!r}: its description does not fit this version of genkit ({error})") from None


def load_exported(path: str | os.PathLike[str], *formats: str) -> tuple[Any, dict[str, Any]]:
    """A network in eval mode, float32, frozen, and what its header says.

    Args:
        formats: the keys of :data:`FORMATS` that will do; none: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, of another format, or its weights do not fit its description.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give one that a recipe of genkit.training exported")
    weights, metadata = read_safetensors(path)
    kind, config, about = described(path, metadata, *formats)
    try:
        network = kind(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r}: its description does not fit this version of genkit ({error})") from None
    fit(network, weights, path, what="the network it describes")
    return network.eval().requires_grad_(False), about
