"""Changes to what a prediction is conditioned on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.guidance.base import Host, StepInfo

#: Parts of the names under which embeddings stand in the conditions of common networks.
EMBEDDINGS = ("embed", "hidden_states", "pooled", "text", "prompt", "feats", "label")


def is_embedding(value: Tensor, name: str) -> bool:
    """Whether it is a real-valued tensor (B, ..., d), in a mapping with a name of ``EMBEDDINGS`` that ends in no mask or ids."""
    own = name.rsplit(".", 1)[-1]
    named = not name or (any(part in own for part in EMBEDDINGS) and not own.endswith(("mask", "ids")))
    return value.is_floating_point() and value.ndim > 1 and named


def is_label(value: Tensor, name: str) -> bool:
    """Whether it holds class labels: integers, in a mapping under a name with "label" in it."""
    return not value.is_floating_point() and value.dtype is not torch.bool and (not name or "label" in name)


def replaced(owner: str, condition: Any, change: Callable[[Tensor, str], Tensor | None]) -> Any:
    """The condition with ``change(tensor, dotted name)`` in place of its tensors; where that is None they stay.

    Raises:
        ValueError: all of them would stay.
    """
    names, changed = list[str](), list[str]()

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()}
        names.append(name)
        new = change(value, name) if isinstance(value, Tensor) else None
        if new is None:
            return value
        changed.append(name)
        return new

    out = walk(condition, "")
    if not changed:
        has = ", ".join(names) if isinstance(condition, Mapping) else type(condition).__name__
        raise ValueError(
            f"{owner} changes the embedding of the condition, but finds none in it ({has}): that is a real-valued tensor "
            f"(B, ..., d), in a mapping with one of {', '.join(EMBEDDINGS)} in its name; "
            "class labels need a model with embed(labels)"
        )
    return out


def step_noise(like: Tensor, info: StepInfo, run: Host, draw: int) -> Tensor:
    """Unit noise that stays the same in all evaluations of a step, so that a solver of higher order sees one field."""
    return run.noise(like, info._replace(stage="step"), draw)


def drawn(owner: str, name: str, like: Tensor, info: StepInfo, run: Host) -> Tensor:
    """Unit noise for one tensor of a condition; those of one name, as of a network and its ControlNet, get the same."""
    draw = zlib.crc32(f"{owner} {name.rsplit('.', 1)[-1]}".encode())  # far from the small numbers of other draws
    return step_noise(like, info, run, draw)
