"""Loading of autoregressive models: official checkpoints, recognised by their keys, and genkit's own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.pipelines.autoregressive_base import Autoregressive
from genkit.pipelines.hub import SUFFIXES
from genkit.pipelines.recognise import KINDS, Found, recognise
from genkit.pipelines.text import CLIPText, T5Features
from genkit.samplers.autoregressive.filters import Filters
from genkit.weights import fit, read_safetensors, read_weights

log = logging.getLogger("genkit")
FORMAT = "genkit-autoregressive-1"
PIPELINES: dict[str, type[Autoregressive]] = {
    "var": ScalePipeline,
    "llamagen": TokenPipeline,
    "open-magvit2": TokenPipeline,
    "flowar": FlowScalePipeline,
}


class Piece(NamedTuple):
    """One module of a file."""

    found: Found
    path: Path


def load_autoregressive(
    path: Path,
    *,
    tokenizer: Path | None = None,
    text_encoder: Any = None,
    image_size: int | None = None,
) -> Autoregressive | None:
    """A pipeline from a file, or from a folder with a network and its tokenizer; None if no autoregressive model is in it.

    Args:
        path: a checkpoint that :func:`save_autoregressive` wrote, or an official one (see :mod:`genkit.pipelines.recognise`).
        tokenizer: file of the tokenizer, where ``path`` does not hold it.
        text_encoder: for models of text: a folder or hub id of transformers, or what turns prompts into features.
        image_size: pixels along a side, for LlamaGen, whose weights do not tell.

    Raises:
        ValueError: a damaged file, one that needs code to load, weights that do not fit, a network without its tokenizer or the
            other way round, a tokenizer of another model.
        FileNotFoundError: no such tokenizer.
    """
    if path.suffix == ".safetensors" and path.is_file():
        metadata = read_safetensors(path, name="model")[1]
        if metadata.get("format") == FORMAT:
            return _own(path, metadata, text_encoder)
    pieces = [piece for file in _files(path) for piece in _pieces(file, image_size)]
    if not pieces:
        if path.is_file() and path.suffix != ".safetensors":
            raise ValueError(f"model={str(path)!r} holds no model that genkit knows; first keys {_first_keys(path)}")
        return None
    if tokenizer is not None:
        extra = [piece for file in _files(tokenizer, must=True) for piece in _pieces(file, image_size)]
        pieces = [p for p in pieces if not p.found.tokenizer] + [p for p in extra if p.found.tokenizer]
        if not any(p.found.tokenizer for p in pieces):
            what = ", ".join(p.found.title for p in extra) or "no model that genkit knows"
            raise ValueError(f"tokenizer={str(tokenizer)!r} holds {what}, no tokenizer")
    network, coder = _pair(path, pieces)
    return _assemble(path, *_fitted(network, coder), text_encoder)


def _files(path: Path, must: bool = False) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if must and not path.is_file():
        raise FileNotFoundError(f"tokenizer={str(path)!r} is not a file; give the checkpoint of the tokenizer")
    return [path] if path.is_file() else []


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, name="model")[0]
    return read_weights(path, parts=("var_wo_ddp",), lazy=True)


def _pieces(path: Path, image_size: int | None) -> list[Piece]:
    try:
        return [Piece(found, path) for found in recognise(_read(path), image_size, path.name)]
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"model={str(path)!r}: {error}") from None


def _first_keys(path: Path) -> str:
    return ", ".join(list(_read(path))[:3])


def _pair(path: Path, pieces: list[Piece]) -> tuple[Piece, Piece]:
    networks, coders = ([p for p in pieces if p.found.tokenizer is kind] for kind in (False, True))
    held = ", ".join(f"{p.found.title} ({p.path.name})" for p in pieces)
    if len(networks) == len(coders) == 1:
        return networks[0], coders[0]
    if not networks:
        raise ValueError(f"model={str(path)!r} holds {held}, which is no network; genkit.load(network, tokenizer={str(path)!r})")
    if not coders:
        raise ValueError(f"model={str(path)!r} holds {held}, which needs its tokenizer: genkit.load(..., tokenizer='FILE')")
    raise ValueError(f"model={str(path)!r} holds {held}; give one network, and its tokenizer as tokenizer='FILE'")


def _fitted(network: Piece, coder: Piece) -> tuple[Piece, Piece]:
    """Both with configurations that agree. Raises ValueError if the tokenizer is another one's."""
    net, tok = network.found.config, coder.found.config
    pairs: dict[tuple[str, str], Callable[[], tuple[Any, Any]]] = {
        ("var", "var-vqvae"): lambda: ((net.vocabulary, net.code_dim), (tok.size, tok.dim)),
        ("llamagen", "llamagen-vq"): lambda: (net.vocabulary, tok.size),
        ("open-magvit2", "open-magvit2-lfq"): lambda: (sum(net.bits), tok.bits),
        ("flowar", "kl"): lambda: (net.channels, tok.z_channels),
    }
    sizes = pairs.get((network.found.kind, coder.found.kind), lambda: (0, 1))()
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"tokenizer={str(coder.path)!r} is {coder.found.title}, which does not go with {network.found.title}; "
            "give the tokenizer it was trained with"
        )
    if network.found.kind == "var":
        tok = replace(tok, patch_nums=net.patch_nums)
    elif network.found.kind == "open-magvit2":
        tok = replace(tok, parts=net.bits)
    elif network.found.kind == "llamagen":  # tokens were counted at 16 pixels each
        net = replace(net, tokens=net.tokens * 4 ** (5 - len(tok.multipliers)))
    return (
        Piece(replace(network.found, config=net), network.path),
        Piece(replace(coder.found, config=tok), coder.path),
    )


def _assemble(path: Path, network: Piece, coder: Piece, text_encoder: Any) -> Autoregressive:
    with torch.device("meta"):  # no file lacks a weight of it
        main: Any = network.found.build()
    tokenizer: Any = coder.found.build()
    try:
        main.load_state(network.path)
        tokenizer.load_state(coder.path)
    except ValueError as error:
        raise ValueError(f"{error}; recognised as {network.found.title}, with {coder.found.title}") from None
    text = f"{network.found.title} ({network.path.name}), with {coder.found.title} ({coder.path.name})"
    text += f"; {network.found.assumed}" if network.found.assumed else ""
    files = dict.fromkeys((network.path, coder.path))
    return _pipeline(network.found.kind, main, tokenizer, path.stem, text, list(files), text_encoder)


def _pipeline(
    kind: str, main: nn.Module, tokenizer: nn.Module, name: str, found: str, files: list[Path], text_encoder: Any, **options: Any
) -> Autoregressive:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    log.info("%s is %s", name, found)
    for module in (main, tokenizer):
        module.requires_grad_(False).eval()
    pipe = PIPELINES[kind]({"main": main}, tokenizer, name, found, fingerprint=digest.hexdigest(), **options)
    pipe.text_encoder = _text_encoder(pipe, text_encoder)
    return pipe


def _text_encoder(pipe: Autoregressive, given: Any) -> Any:
    if given is None:
        return None
    if pipe.num_classes is not None:
        raise ValueError(f"text_encoder={given!r}: {pipe.name} takes classes, no text")
    if callable(given):
        return given
    if isinstance(pipe, TokenPipeline):
        return T5Features.from_pretrained(given, pipe.network.config.text_tokens)
    return CLIPText.from_pretrained(given)


def save_autoregressive(path: Path, pipe: Autoregressive, extra: Mapping[str, Any] | None = None) -> None:
    """Write network and tokenizer into one file in half precision, with all that loading needs, by way of a temporary file.

    Args:
        path: of the file, ``.safetensors``.
        pipe: its text encoder and its further models are not written.
        extra: further plain values for the metadata (training images, recipe, ...).

    Raises:
        ValueError: a network or tokenizer that no kind of :data:`genkit.pipelines.recognise.KINDS` is.
    """
    modules = {"network": pipe.network, "tokenizer": pipe.tokenizer}
    filters = [pipe.filters] if isinstance(pipe.filters, Filters) else pipe.filters
    about: dict[str, Any] = {"class_names": list(pipe.class_names), "filters": [asdict(one) for one in filters], **(extra or {})}
    weights: dict[str, Tensor] = {}
    for role, module in modules.items():
        kind = next((name for name, kind in KINDS.items() if kind.module is type(module)), None)
        if kind is None:
            raise ValueError(f"{role} is a {type(module).__name__}, which has no kind; use one of {', '.join(KINDS)}")
        about[role] = {"kind": kind, **asdict(module.config)}
        for key, value in module.state_dict().items():
            value = value.detach().half() if value.is_floating_point() else value
            weights[f"{role}.{key}"] = value.clone(memory_format=torch.contiguous_format).cpu()
    temporary = path.with_suffix(".tmp")
    save_file(weights, temporary, metadata={"format": FORMAT, "config": json.dumps(about)})
    os.replace(temporary, path)


def _own(path: Path, metadata: Mapping[str, str], text_encoder: Any) -> Autoregressive:
    weights = read_safetensors(path, name="model")[0]
    try:
        about = json.loads(metadata["config"])
        names = tuple(about["class_names"])
        filters = tuple(Filters(**one) for one in about["filters"])
        built = {role: _built(about[role]) for role in ("network", "tokenizer")}
        kind = about["network"]["kind"]
        options: dict[str, Any] = {"class_names": names, "filters": filters[0] if len(filters) == 1 else filters}
        if kind not in PIPELINES:
            raise ValueError(f"{kind!r} is no network")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"model={str(path)!r}: its metadata does not fit this version of genkit ({error!r})") from None
    for role, module in built.items():
        own = {key.removeprefix(f"{role}."): value for key, value in weights.items() if key.startswith(f"{role}.")}
        fit(module, own, path, name="model", what=f"the {role} it describes")
    if names and len(names) != built["network"].config.num_classes:
        raise ValueError(f"model={str(path)!r}: its metadata has class_names={names}, but another number of classes")
    found = f"genkit's own {kind} with {about['tokenizer']['kind']}"
    return _pipeline(kind, built["network"], built["tokenizer"], path.stem, found, [path], text_encoder, **options)


def _built(about: Mapping[str, Any]) -> Any:
    kind = KINDS[about["kind"]]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items() if key != "kind"}
    return kind.module(kind.config(**values))


__all__ = ["FORMAT", "load_autoregressive", "save_autoregressive"]
