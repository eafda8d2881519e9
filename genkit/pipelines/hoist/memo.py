"""Outputs of a layer kept for the inputs it saw last: for what comes again at every step, as the text does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

KEEP = 3  # inputs that come in turn: one branch alone, both, a weakened one
OURS = ("torch.nn.", "diffusers.", "genkit.")  # layers of other libraries (LoRA) have state beside their weights
PROJECTIONS = ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj")
EMBEDDINGS = ("caption_projection", "caption_norm", "context_embedder", "text_embedder", "cond_embed")
LAYERS = ("Linear", "LayerNorm", "RMSNorm", "PixArtAlphaTextProjection")


@dataclass
class Count:
    """How often something was computed, and how often what was there could be used again."""

    computed: int = 0
    reused: int = 0


def constant(network: nn.Module) -> Iterator[nn.Module]:
    """Layers whose input is the same at every step: keys and values of cross-attention, and what comes before them."""
    for name, module in network.named_modules():
        if getattr(module, "is_cross_attention", False):
            found = [getattr(module, part, None) for part in PROJECTIONS]
        elif type(module).__name__ == "CrossBlock":  # of FlowAR
            found = [getattr(module, "norm2_2", None), getattr(getattr(module, "crossattn", None), "kv", None)]
        else:
            found = [module] if name.rpartition(".")[2] in EMBEDDINGS else []
        yield from (layer for layer in found if layer is not None and type(layer).__name__ in LAYERS)


class Seen(NamedTuple):
    """A tensor as it was."""

    tensor: Tensor
    version: int
    pointer: int

    @classmethod
    def now(cls, tensor: Tensor) -> Seen:
        return cls(tensor, tensor._version, tensor.data_ptr())

    def unchanged(self) -> bool:
        return self.tensor._version == self.version and self.tensor.data_ptr() == self.pointer

    def same(self, other: Tensor) -> bool:
        """Whether ``other`` is this tensor, or the same view of the same tensor, and nothing was written to it since.

        A view is another object each time it is made, but it counts the writes together with what it is a view of.
        """
        mine = self.tensor
        if other is not mine:
            base = mine._base
            if base is None or other._base is not base or other.dtype != mine.dtype or other.data_ptr() != self.pointer:
                return False
            if other.shape != mine.shape or other.stride() != mine.stride():
                return False
        return self.unchanged()


class Entry(NamedTuple):
    x: Seen
    weights: tuple[Seen, ...]
    mode: Any
    output: Seen

    def serves(self, x: Tensor, weights: list[Tensor], mode: Any) -> bool:
        return (
            self.x.same(x)
            and mode == self.mode
            and len(weights) == len(self.weights)
            and all(a is b.tensor and b.unchanged() for a, b in zip(weights, self.weights, strict=True))
            and self.output.unchanged()
        )


class Memo:
    """Answers the calls of a layer with an earlier output where input and weights are the tensors they were, unwritten.

    Everything else goes to the layer: calls under autograd, inference tensors (writes to them are not counted), layers and
    tensors of kinds that are not known.
    """

    def __init__(self, module: nn.Module, count: Count) -> None:
        self.module, self.count, self.entries = module, count, list[Entry]()

    def __call__(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        weights = None if kwargs or len(args) != 1 or torch.is_grad_enabled() or not known(args[0]) else self._weights()
        if weights is None:
            return original(*args, **kwargs)
        x, mode = args[0], (torch.is_inference_mode_enabled(), _autocast(args[0]))
        for entry in self.entries:
            if entry.serves(x, weights, mode):
                self.count.reused += 1
                return entry.output.tensor
        before = Seen.now(x)
        output = original(x)
        self.count.computed += 1
        if known(output) and before.unchanged():
            self.entries.insert(0, Entry(before, tuple(map(Seen.now, weights)), mode, Seen.now(output)))
            del self.entries[KEEP:]
        return output

    def _weights(self) -> list[Tensor] | None:
        """Its parameters and buffers; None if there may be more to it."""
        parts = list(self.module.modules()) if self.module._modules else [self.module]
        if not all(map(ours, parts)):
            return None
        found = [w for part in parts for w in (*part._parameters.values(), *part._buffers.values()) if w is not None]
        return found if all(map(known, found)) else None


def ours(layer: nn.Module) -> bool:
    """Whether all there is to a layer are its weights."""
    return type(layer).__module__.startswith(OURS)


def known(tensor: Any) -> TypeGuard[Tensor]:
    """Whether writes to this tensor can be noticed."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and not tensor.is_meta


def _autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


__all__ = ["Count", "Memo", "constant", "known", "ours"]
