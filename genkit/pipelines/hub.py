"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: What checkpoints end with.
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
#: Names that are taken for a repository: owner/name.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub(name: str) -> bool:
    """Whether a name is ``"hf:owner/name"``, ``"hf:owner/name/file"``, or an ``"owner/name"`` that is nothing local."""
    if name.startswith("hf:"):
        return True
    local = name.startswith("builtin/") or name.endswith(SUFFIXES) or os.path.exists(name)
    return not local and REPOSITORY.fullmatch(name) is not None


def fetch(name: str, argument: str = "model") -> Path:
    """The local path of a file of the hub, or of a folder with all that a small repository holds; downloaded at need.

    Raises:
        ValueError: no name of a repository; or it holds several checkpoints, of which one must be named.
        FileNotFoundError: it cannot be had: no such thing, or no connection and nothing in the cache.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    owner, _, rest = name.removeprefix("hf:").partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"{argument}={name!r}: a name of the hub is 'hf:owner/name' or 'hf:owner/name/file'")
    repo = f"{owner}/{repository}"
    try:
        if file:
            return Path(hf_hub_download(repo, file))
        files = _files(repo)
        if "model_index.json" in files:
            return Path(snapshot_download(repo))
        weights = [f for f in files if f.endswith(SUFFIXES)]
        if len(weights) in (1, 2):  # a model in one file, or a network and its tokenizer
            paths = [Path(hf_hub_download(repo, f)) for f in weights]
            return paths[0] if len(paths) == 1 else paths[0].parent
    except HFValidationError as error:
        raise ValueError(f"{argument}={name!r} is no name of the hub ({error})") from None
    except (OSError, ValueError) as error:  # the hub's errors are both
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{argument}={name!r} is not here and cannot be had from the hub ({reason})") from None
    if not weights:
        raise ValueError(f"{argument}={name!r} holds no checkpoint ({', '.join(SUFFIXES)})")
    some = ", ".join(weights[:12])
    raise ValueError(f"{argument}={name!r} holds {len(weights)} checkpoints ({some}); name one: 'hf:{repo}/{weights[0]}'")


def _files(repo: str) -> list[str]:
    from huggingface_hub import HfApi, snapshot_download

    try:
        return list(HfApi().list_repo_files(repo))
    except OSError as error:
        try:  # offline: what is in the cache
            folder = Path(snapshot_download(repo, local_files_only=True))
        except (OSError, ValueError):
            raise error from None
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


__all__ = ["SUFFIXES", "fetch", "is_hub"]
