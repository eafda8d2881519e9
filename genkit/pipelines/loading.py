"""``genkit.load``: a pipeline from a built-in name or a checkpoint file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors.torch import save_file

from genkit.denoiser import Denoiser, EDMDenoiser
from genkit.files import write_atomically
from genkit.models.minority import load_minority
from genkit.models.unet import UNet, UNetConfig
from genkit.pipelines.autoregressive import ScalePipeline, TokenPipeline
from genkit.pipelines.diffusion import ClassPipeline
from genkit.pipelines.hub import fetch, is_hub
from genkit.pipelines.loading_ar import load_autoregressive
from genkit.weights import fit, read_safetensors

#: Where the files of built-in models lie.
ASSETS = Path(str(files("genkit") / "assets"))
#: Built-in models: files of the main network, of its tokenizer, and, where they exist, of the others that go with it.
BUILTIN: dict[str, dict[str, str]] = {
    "builtin/cifar10": {
        "main": "cifar10/diffusion.safetensors",
        "weak": "cifar10/diffusion_weak.safetensors",
        "minority": "cifar10/minority.safetensors",
    },
    "builtin/cifar10-next-token": {
        "main": "cifar10/next_token.safetensors",
        "tokenizer": "cifar10/tokenizer.safetensors",
        "drafter": "cifar10/drafter.safetensors",
    },
    "builtin/cifar10-next-token-cca": {
        "main": "cifar10/next_token_cca.safetensors",
        "tokenizer": "cifar10/tokenizer.safetensors",
        "drafter": "cifar10/drafter.safetensors",
    },
    "builtin/cifar10-next-scale": {
        "main": "cifar10/next_scale.safetensors",
        "tokenizer": "cifar10/tokenizer_multiscale.safetensors",
    },
}
#: How to read what goes with a main network: its early, weaker snapshot, and a classifier of minority levels.
READERS: dict[str, Callable[[Path], Denoiser]] = {
    "weak": lambda path: load_checkpoint(path)[0],
    "minority": load_minority,
}

FORMAT = "genkit-edm-unet-1"


@overload
def load(model: Literal["builtin/cifar10"], *, device: str | torch.device = "cpu") -> ClassPipeline: ...
@overload
def load(
    model: Literal["builtin/cifar10-next-token", "builtin/cifar10-next-token-cca"], *, device: str | torch.device = "cpu"
) -> TokenPipeline: ...
@overload
def load(model: Literal["builtin/cifar10-next-scale"], *, device: str | torch.device = "cpu") -> ScalePipeline: ...
@overload
def load(
    model: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    drafter: str | os.PathLike[str] | None = None,
    text_encoder: Any = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> Any: ...
def load(
    model: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    drafter: str | os.PathLike[str] | None = None,
    text_encoder: Any = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """A pipeline for a built-in model (``"builtin/cifar10"``), a checkpoint, a folder, or a name on the Hugging Face hub.

    Built-in models, all of CIFAR-10: ``builtin/cifar10``, diffusion; ``builtin/cifar10-next-token``, with its drafter;
    ``builtin/cifar10-next-token-cca``, tuned to need no guidance; ``builtin/cifar10-next-scale``.

    A checkpoint is one that genkit wrote, or an official one of VAR, VAR-CLIP, LlamaGen, Open-MAGVIT2 or FlowAR, recognised by
    its keys; ``pipe.found`` says as what. For a folder of diffusers, one with a model_index.json, it is a ``DiffusersPipeline``.

    Args:
        model: the name or path. On the hub: ``"owner/name"``, ``"hf:owner/name"``, or ``"hf:owner/name/file"``.
        tokenizer: the image tokenizer's checkpoint, for an autoregressive model whose file or folder does not hold it.
        drafter: an EAGLE drafter's checkpoint, for speculative decoding of a LlamaGen.
        text_encoder: for autoregressive models of text: a folder or hub id of transformers (T5 for LlamaGen, CLIP for VAR-CLIP),
            or a function from prompts to features.
        image_size: pixels along a side, for LlamaGen, whose weights do not tell.
        device: where it is to run.

    Raises:
        ValueError: an unknown name, a file that is damaged or of another kind or needs code to load, weights that are not finite,
            a network without its tokenizer, a tokenizer or drafter of another network.
        FileNotFoundError: no such file, here or on the hub.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"model={model!r}: give one of {', '.join(BUILTIN)}, or a path to a .safetensors file")
    name, device = os.fspath(model), check_device(device)
    path = fetch(name) if is_hub(name) else Path(name)
    if (path / "model_index.json").is_file():
        return _load_diffusers(str(path)).to(device)
    paths = _builtin(name) if name.startswith("builtin/") else {"main": path}
    for role, given in (("tokenizer", tokenizer), ("drafter", drafter)):
        if given is not None:
            paths[role] = fetch(os.fspath(given), role) if is_hub(os.fspath(given)) else Path(given)
    if name not in BUILTIN or "tokenizer" in paths:
        coder, head = paths.get("tokenizer"), paths.get("drafter")
        options = {"text_encoder": text_encoder, "image_size": image_size}
        other = load_autoregressive(paths["main"], tokenizer=coder, drafter=head, **options)
        if other is not None:
            other.name = name if name in BUILTIN else other.name
            return other.to(device)
    return _load_diffusion(name, paths).to(device)


def _builtin(name: str) -> dict[str, Path]:
    """The files of a built-in model by their role. Network and tokenizer must be there, the others need not."""
    if name not in BUILTIN:
        raise ValueError(
            f"model={name!r} is not a built-in model; use one of {', '.join(BUILTIN)}, or a path to a .safetensors file"
        )
    paths = {role: ASSETS / file for role, file in BUILTIN[name].items()}
    for role, path in paths.items():
        if role in ("main", "tokenizer") and not path.is_file():
            raise FileNotFoundError(
                f"model={name!r}: its file {path} is missing in this installation; install genkit-image again"
            )
    return {role: path for role, path in paths.items() if path.is_file()}


def _load_diffusion(name: str, paths: Mapping[str, Path]) -> ClassPipeline:
    denoiser, about = load_checkpoint(paths["main"])
    others = {role: READERS[role](path) for role, path in paths.items() if role in READERS}
    config = denoiser.network.config
    assert isinstance(config, UNetConfig)
    names = about["class_names"]
    return ClassPipeline(
        models={"main": denoiser, **others},
        class_names=tuple(names),
        image_shape=(config.image_channels, config.image_size, config.image_size),
        fingerprint=hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest(),
        name=name if name in BUILTIN else Path(name).stem,
        sigma_min=float(about["sigma_min"]),
        sigma_max=float(about["sigma_max"]),
    )


def _load_diffusers(folder: str) -> Any:
    if find_spec("diffusers") is None:
        raise ImportError(f"model={folder!r} is a folder of diffusers, which is not installed: pip install diffusers")
    from genkit.pipelines.diffusers_pipeline import DiffusersPipeline  # takes seconds to import

    return DiffusersPipeline.from_pretrained(folder)


def check_device(device: str | torch.device) -> torch.device:
    """The device, if tensors can be put on it. Raises ValueError naming what torch says and what would work."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found, dtype=torch.float64)  # noise levels and projections are float64, which MPS lacks
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); 'cpu' works") from None
    return found


def load_checkpoint(path: Path) -> tuple[EDMDenoiser, dict[str, Any]]:
    """A denoiser in eval mode, float32, and its metadata. Raises as :func:`load` does."""
    if not path.is_file():
        raise FileNotFoundError(
            f"model={str(path)!r} is not a file; give a .safetensors checkpoint or one of {', '.join(BUILTIN)}"
        )
    weights, metadata = read_safetensors(path, name="model")
    about = _about(path, metadata)
    try:
        network = UNet(UNetConfig(**about["network"]))
        denoiser = EDMDenoiser(network, float(about["sigma_data"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model={str(path)!r}: its network description does not fit this version of genkit ({error})") from None
    _agree(path, about, network.config.num_classes)
    fit(denoiser, weights, path, name="model", what="the network it describes")
    # Plain eval-mode weights; channels-last is what the CPU convolutions are fastest in.
    return denoiser.eval().requires_grad_(False).to(memory_format=torch.channels_last), about  # type: ignore[call-overload]


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"model={str(path)!r} says format={metadata.get('format')!r}; this loader reads {FORMAT!r}")
    try:
        about: dict[str, Any] = json.loads(metadata["config"])
        missing = {"network", "sigma_data", "sigma_min", "sigma_max", "class_names"} - set(about)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model={str(path)!r}: its metadata is damaged ({error})") from None
    if missing:
        raise ValueError(f"model={str(path)!r}: its metadata lacks {', '.join(sorted(missing))}")
    return about


def _agree(path: Path, about: Mapping[str, Any], classes: int) -> None:
    names, low, high = about["class_names"], about["sigma_min"], about["sigma_max"]
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"model={str(path)!r}: its metadata has class_names={names!r}, but its network has {classes} classes")
    if not all(isinstance(v, int | float) for v in (low, high)) or not 0 < low < high < math.inf:
        raise ValueError(
            f"model={str(path)!r}: its metadata has sigma_min={low!r}, sigma_max={high!r}; 0 < sigma_min < sigma_max is needed"
        )


def save_checkpoint(
    path: Path, denoiser: EDMDenoiser, class_names: tuple[str, ...], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a denoiser around a :class:`UNet` in half precision, with all that :func:`load` needs, by way of a temporary file.

    Args:
        extra: further plain values for the metadata (training images, recipe, ...).
    """
    config = denoiser.network.config
    assert isinstance(config, UNetConfig)
    about = {
        "network": asdict(config),
        "sigma_data": denoiser.sigma_data,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "class_names": list(class_names),
        **(extra or {}),
    }
    weights = {key: value.detach().half().contiguous().cpu() for key, value in denoiser.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))
