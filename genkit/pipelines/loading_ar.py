"""Loading of autoregressive models: official checkpoints, recognised by their keys, and genkit's own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.files import write_atomically
from genkit.models.eagle import EagleHead
from genkit.pipelines.autoregressive import FlowScalePipeline, ScalePipeline, TokenPipeline
from genkit.pipelines.autoregressive_base import Autoregressive
from genkit.pipelines.exported import FORMATS, described
from genkit.pipelines.hub import SUFFIXES
from genkit.pipelines.recognise import KINDS, Found, Role, recognise
from genkit.pipelines.speculative import check_head
from genkit.pipelines.text import CLIPText, T5Features
from genkit.samplers.autoregressive.filters import Filters
from genkit.weights import fingerprint, fit, read_safetensors, read_weights

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
    drafter: Path | None = None,
    text_encoder: Any = None,
    image_size: int | None = None,
) -> Autoregressive | None:
    """A pipeline from a file, or from a folder with a network and its tokenizer; None if no autoregressive model is in it.

    Args:
        path: a checkpoint that :func:`save_autoregressive` or a recipe of genkit.training wrote, or an official one (see
            :mod:`genkit.pipelines.recognise`).
        tokenizer, drafter: their files, where ``path`` does not hold them. A drafter there need not be.
        text_encoder: for models of text: a folder or hub id of transformers, or what turns prompts into features.
        image_size: pixels along a side, for LlamaGen, whose weights do not tell.

    Raises:
        ValueError: a damaged file, one that needs code to load, weights that do not fit, a network without its tokenizer or the
            other way round, a tokenizer or drafter of another model.
        FileNotFoundError: no such tokenizer or drafter.
    """
    drafters = [] if drafter is None else _extra("drafter", drafter, image_size)
    if metadata := _own_metadata(path):
        pipe, coder = _own(path, metadata, text_encoder), None
    else:
        pieces = [piece for file in _files(path) for piece in _pieces(file, image_size)]
        if not pieces:
            if path.is_file() and path.suffix != ".safetensors":
                raise ValueError(f"model={str(path)!r} holds no model that genkit knows; first keys {_first_keys(path)}")
            return None
        if tokenizer is not None:
            pieces = [p for p in pieces if p.found.role != "tokenizer"] + _extra("tokenizer", tokenizer, image_size)
        network, coder = _fitted(*_pair(path, pieces))
        pipe = _assemble(path, network, coder, text_encoder)
        drafters = drafters or [p for p in pieces if p.found.role == "drafter"]
    if drafters:
        _add_drafter(pipe, drafters, coder)
    return pipe


def _own_metadata(path: Path) -> Mapping[str, str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    metadata = read_safetensors(path, name="model")[1]
    return metadata if metadata.get("format") == FORMAT else {}


def _extra(role: Role, file: Path, image_size: int | None) -> list[Piece]:
    pieces = [piece for at in _files(file, role) for piece in _pieces(at, image_size)]
    if not any(p.found.role == role for p in pieces):
        what = ", ".join(p.found.title for p in pieces) or "no model that genkit knows"
        raise ValueError(f"{role}={str(file)!r} holds {what}, no {role}")
    return [p for p in pieces if p.found.role == role]


def _files(path: Path, role: str = "") -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if role and not path.is_file():
        raise FileNotFoundError(f"{role}={str(path)!r} is not a file; give the checkpoint of the {role}")
    return [path] if path.is_file() else []


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, name="model")[0]
    return read_weights(path, parts=("var_wo_ddp",), lazy=True)


def _pieces(path: Path, image_size: int | None) -> list[Piece]:
    try:
        if path.suffix == ".safetensors" and (metadata := read_safetensors(path, name="model")[1]).get("format") in FORMATS:
            return [Piece(_exported(path, metadata), path)]
        return [Piece(found, path) for found in recognise(_read(path), image_size, path.name)]
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"model={str(path)!r}: {error}") from None


def _exported(path: Path, metadata: Mapping[str, str]) -> Found:
    module, config, about = described(path, metadata)
    kind = next(name for name, kind in KINDS.items() if kind.module is module)
    title = f"genkit's {metadata['format'].removeprefix('genkit-').rpartition('-')[0]}"
    return Found(kind, f"{title} model" if KINDS[kind].role == "network" else title, config, about=about)


def _first_keys(path: Path) -> str:
    return ", ".join(list(_read(path))[:3])


def _pair(path: Path, pieces: list[Piece]) -> tuple[Piece, Piece]:
    networks, coders = ([p for p in pieces if p.found.role == role] for role in ("network", "tokenizer"))
    held = ", ".join(f"{p.found.title} ({p.path.name})" for p in pieces)
    if len(networks) == len(coders) == 1:
        return networks[0], coders[0]
    if not networks:
        role = pieces[0].found.role
        raise ValueError(f"model={str(path)!r} holds {held}, which is no network; genkit.load(network, {role}={str(path)!r})")
    if not coders:
        raise ValueError(f"model={str(path)!r} holds {held}, which needs its tokenizer: genkit.load(..., tokenizer='FILE')")
    raise ValueError(f"model={str(path)!r} holds {held}; give one network, and its tokenizer as tokenizer='FILE'")


def _fitted(network: Piece, coder: Piece) -> tuple[Piece, Piece]:
    """Both with configurations that agree. Raises ValueError if the tokenizer is another one's."""
    net, tok = network.found.config, coder.found.config
    scales = getattr(tok, "quantizer", "") == "multiscale"
    pairs: dict[tuple[str, str], Callable[[], tuple[Any, Any]]] = {
        ("var", "var-vqvae"): lambda: ((net.vocabulary, net.code_dim), (tok.size, tok.dim)),
        ("llamagen", "llamagen-vq"): lambda: (net.vocabulary, tok.size),
        ("open-magvit2", "open-magvit2-lfq"): lambda: (sum(net.bits), tok.bits),
        ("flowar", "kl"): lambda: (net.channels, tok.z_channels),
        ("llamagen", "compact"): lambda: ((net.vocabulary, net.tokens, False), (tok.size, tok.side**2, scales)),
        ("var", "compact"): lambda: (
            (net.vocabulary, net.code_dim, net.patch_nums, True),
            (tok.size, tok.dim, tok.patch_nums, scales),
        ),
    }
    sizes = pairs.get((network.found.kind, coder.found.kind), lambda: (0, 1))()
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"tokenizer={str(coder.path)!r} is {coder.found.title}, which does not go with {network.found.title}; "
            "give the tokenizer it was trained with"
        )
    _same_codebook(network, coder)
    if coder.found.kind == "compact":
        return network, coder
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


def _same_codebook(piece: Piece, coder: Piece) -> None:
    """Raise ValueError if a recipe trained the piece on tokens of another tokenizer than this one."""
    trained_on = piece.found.about.get("tokenizer")
    if trained_on and coder.found.about and trained_on != (found := fingerprint(coder.path)):
        raise ValueError(
            f"tokenizer={str(coder.path)!r} has the fingerprint {found}, but {piece.found.title} ({piece.path.name}) was trained "
            f"on tokens of {trained_on}; give that"
        )


def _add_drafter(pipe: Autoregressive, pieces: list[Piece], coder: Piece | None) -> None:
    piece = pieces[0]
    config, held = piece.found.config, ", ".join(str(p.path) for p in pieces)
    if not isinstance(pipe, TokenPipeline) or len(pieces) > 1:
        raise ValueError(f"drafter={held!r}: {pipe.name} takes {'one' if isinstance(pipe, TokenPipeline) else 'none'}")
    if not piece.found.about:  # a released file tells neither its heads nor for how many tokens it is
        config = replace(config, heads=pipe.network.config.heads, tokens=pipe.network.tokens, prefix=pipe.network.prefix)
    check_head(config, pipe.network, pipe.name, f"drafter={held!r}")
    if coder is not None:
        _same_codebook(piece, coder)
    pipe.drafter = EagleHead(config).load_state(piece.path).requires_grad_(False)
    pipe.found += f", and {piece.found.title} ({piece.path.name})"
    pipe.fingerprint = hashlib.sha256((pipe.fingerprint + digest([piece.path])).encode()).hexdigest()


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
    names = tuple(network.found.about.get("class_names", ()))
    _check_names(path, names, main)
    files = dict.fromkeys((network.path, coder.path))
    return _pipeline(network.found.kind, main, tokenizer, path.stem, text, list(files), text_encoder, class_names=names)


def _pipeline(
    kind: str, main: nn.Module, tokenizer: nn.Module, name: str, found: str, files: list[Path], text_encoder: Any, **options: Any
) -> Autoregressive:
    log.info("%s is %s", name, found)
    for module in (main, tokenizer):
        module.requires_grad_(False).eval()
    pipe = PIPELINES[kind]({"main": main}, tokenizer, name, found, fingerprint=digest(files), **options)
    pipe.text_encoder = _text_encoder(pipe, text_encoder)
    return pipe


def digest(files: list[Path]) -> str:
    """SHA-256 over files, one after the other."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _check_names(path: Path, names: tuple[str, ...], network: Any) -> None:
    if names and len(names) != network.config.num_classes:
        raise ValueError(f"model={str(path)!r}: its metadata has class_names={names}, but another number of classes")


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
        pipe: its text encoder, its drafter and its further models are not written.
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
    metadata = {"format": FORMAT, "config": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


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
    _check_names(path, names, built["network"])
    found = f"genkit's own {kind} with {about['tokenizer']['kind']}"
    return _pipeline(kind, built["network"], built["tokenizer"], path.stem, found, [path], text_encoder, **options)


def _built(about: Mapping[str, Any]) -> Any:
    kind = KINDS[about["kind"]]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items() if key != "kind"}
    return kind.module(kind.config(**values))


__all__ = ["FORMAT", "load_autoregressive", "save_autoregressive"]
