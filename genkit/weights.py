"""Weights from files: safetensors, or pickles of plain tensors, in the wrappers that official checkpoints come in."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

#: Keys under which training codes put the weights, in the order they are looked for.
WRAPPERS = ("model", "module", "state_dict", "trainer")
#: How torch's safe unpickler says that a file wants something called or built that is no tensor.
CODE = re.compile(r"Unsupported global.*?default|Trying to .*|Can only create new object.*|Can only build.*")


def read_safetensors(path: str | os.PathLike[str], *, name: str = "path") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Args:
        name: the caller's argument, for the error.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{name}={str(path)!r} cannot be read as safetensors ({error}); the file is damaged or of another format"
        ) from None


def fingerprint(path: str | os.PathLike[str]) -> str:
    """12 hexadecimal digits from the weights of a safetensors file, whatever its header says."""
    weights = read_safetensors(path)[0]
    data = b"".join(key.encode() + weights[key].contiguous().numpy().tobytes() for key in sorted(weights))
    return hashlib.sha256(data).hexdigest()[:12]


def read_weights(
    path: str | os.PathLike[str], *, parts: Sequence[str] = (), prefix: str = "", lazy: bool = False
) -> dict[str, Tensor]:
    """The tensors of a checkpoint: ``.safetensors``, or anything else through ``torch.load(weights_only=True)``.

    Args:
        parts: keys to look for before :data:`WRAPPERS` on each level of a nested file, such as ``"var_wo_ddp"``.
        prefix: if any key begins with it, only those are kept, without it.
        lazy: values are read from the disk when they are used, where the format allows it: to look at names and shapes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, needs code to load, or holds no weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give a checkpoint (.safetensors, .pt, .pth, .ckpt)")
    if Path(path).suffix == ".safetensors":
        weights = read_safetensors(path)[0]
    else:
        weights = unwrap(_read_pickle(path, lazy), parts, str(path))
    under = {key.removeprefix(prefix): value for key, value in weights.items() if prefix and key.startswith(prefix)}
    return under or weights


def _read_pickle(path: str | os.PathLike[str], lazy: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy and zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are no pickle can end in any error of the unpickler
        # Of torch's long message, only what the file asks to run: the rest tells how to run it all the same.
        if asks := CODE.search(str(error)):
            raise ValueError(
                f"path={str(path)!r} needs code to load, which is refused ({asks[0][:200]}); "
                "where you trust it, save its tensors as .safetensors and load that"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"path={str(path)!r} cannot be read as a torch checkpoint ({reason}); the file is damaged or of another format"
        ) from None


def unwrap(tree: object, parts: Sequence[str] = (), path: str = "") -> dict[str, Tensor]:
    """The flat dict of tensors inside a nested checkpoint: ``tree["trainer"]["var_wo_ddp"]``, ``tree["state_dict"]``, ``tree``...

    Raises:
        ValueError: there is none.
    """
    keys = (*parts, *WRAPPERS)
    while isinstance(tree, Mapping) and (key := next((k for k in keys if isinstance(tree.get(k), Mapping)), None)):
        tree = tree[key]
    if isinstance(tree, Mapping) and tree and all(isinstance(value, Tensor) for value in tree.values()):
        return dict(tree)
    found = ", ".join(map(repr, list(tree)[:5])) if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
    raise ValueError(f"path={path!r} holds {found or 'nothing'}: no dict of tensors, neither bare nor under {', '.join(keys)}")


def fit(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    optional: Collection[str] = (),
    ignore: tuple[str, ...] = (),
    name: str = "path",
    what: str = "this network",
) -> None:
    """Load ``weights`` into ``module`` if every key and shape agrees and every parameter is finite.

    Values take the dtype and device of the module's own, which may be on the meta device.

    Args:
        path: where the weights came from, ``name`` the caller's argument, ``what`` the thing they should fit: for the errors.
        optional: keys that may be missing; what the module has there stays.
        ignore: prefixes of keys to leave out.

    Raises:
        ValueError: keys are missing, unknown or of another shape (the first three are named), or a value is NaN or infinite.
    """
    own = module.state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith(ignore)}
    wrong = [f"{key} (missing)" for key in own if key not in weights and key not in optional]
    wrong += [
        f"{key} ({tuple(weights[key].shape)} for {tuple(value.shape)})"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    wrong += [f"{key} (unknown)" for key in weights if key not in own]
    if wrong:
        raise ValueError(f"{name}={str(path)!r}: {len(wrong)} weights do not fit {what}, first {', '.join(wrong[:3])}")
    trained = {key for key, _ in module.named_parameters()}
    for key, value in weights.items():
        # Buffers may be infinite: attention masks are stored as one.
        if bool((~value.isfinite() if key in trained else value.isnan()).any()):
            raise ValueError(
                f"{name}={str(path)!r}: weight {key!r} holds NaN or infinity; the file is damaged or the training diverged"
            )
    values = {key: value.to(own[key].dtype) for key, value in weights.items()}
    module.load_state_dict(values, strict=False, assign=any(value.is_meta for value in own.values()))
