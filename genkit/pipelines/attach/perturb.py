"""Layers of diffusers networks, weakened from outside: for PAG, SEG and SLG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from genkit.guidance.base import Perturbation
from genkit.models import perturb
from genkit.models.compiled import eagerly
from genkit.pipelines.attach.attend import attend
from genkit.pipelines.attach.replace import replaced

Tokens = Literal["all", "first", "last"]
ATTENTIONS = (scaled_dot_product_attention, attend)

# Blocks by class: their self-attention, which of its tokens are the image's, and whether the block returns (text, image).
BLOCKS: dict[str, tuple[str, Tokens, bool]] = {
    "BasicTransformerBlock": ("attn1", "all", False),
    "SanaTransformerBlock": ("attn1", "all", False),
    "WanTransformerBlock": ("attn1", "all", False),
    "JointTransformerBlock": ("attn", "first", True),
    "FluxTransformerBlock": ("attn", "last", True),
    "QwenImageTransformerBlock": ("attn", "last", True),
}
_found: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


@contextmanager
def weaken(module: nn.Module, perturbation: Perturbation, shape: tuple[int, ...]) -> Iterator[None]:
    """Inside, layers of a diffusers network are weakened, and it runs uncompiled. They are put back however it ends.

    Layers are named as in ``module.named_modules()``, up to the block, ``"mid_block.attentions.0.transformer_blocks.0"``, or by
    the beginning of such a name; blocks of a transformer also by number, ``"7"``. ``"mid"``, the default, are those of a UNet's
    middle block, or the block in the middle of a transformer. In joint attention with a text, "identity" and "blur" change the
    tokens of the image alone.

    Args:
        shape: of the noisy image (..., height, width), which "blur" lays the tokens out by.

    Raises:
        ValueError: a network whose blocks are not known, a layer it does not have, or one that cannot be weakened so.
    """
    blocks = _blocks(module)
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} cannot be weakened in its layers: genkit knows only blocks of {', '.join(BLOCKS)}"
        )
    with eagerly(), ExitStack() as stack:
        for block in perturb.select(blocks, perturbation.layers or ("mid",)):
            name, tokens, pair = BLOCKS[type(block).__name__]
            if perturbation.kind == "skip":
                stack.enter_context(_forward(block, _passing(pair)))
            else:
                attention = getattr(block, name)
                stack.enter_context(_forward(attention, _weakened(attention, perturbation, tokens, shape)))
        yield


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name, those in the middle also as "mid. ...", those of a transformer also by number."""
    if module not in _found:
        blocks = {name: block for name, block in module.named_modules() if type(block).__name__ in BLOCKS}
        names = list(blocks)
        mid = [name for name in names if "mid_block" in name]
        numbers = {} if mid else {str(i): blocks[name] for i, name in enumerate(names)}
        mid = mid or names[len(names) // 2 :][:1]
        _found[module] = {**blocks, **numbers, **{f"mid.{name}": blocks[name] for name in mid}}
    return _found[module]


def _forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    return replaced(module, "forward", lambda _, args, kwargs: forward(*args, **kwargs))


def _passing(pair: bool) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        text = encoder_hidden_states if encoder_hidden_states is not None or not args else args[0]
        return (text, hidden_states) if pair else hidden_states

    return forward


def _weakened(attention: nn.Module, perturbation: Perturbation, tokens: Tokens, shape: tuple[int, ...]) -> Callable[..., Any]:
    original = attention.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        image = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        with _Attention(perturbation, tokens, image, shape) as mode:
            out = original(hidden_states, *args, **kwargs)
        if not mode.used:
            raise ValueError(
                f"{type(attention).__name__} cannot be weakened to {perturbation.kind!r}: it does not call torch's "
                f"scaled_dot_product_attention, with {type(getattr(attention, 'processor', None)).__name__}"
            )
        return out

    return forward


class _Attention(TorchFunctionMode):
    """Inside, ``scaled_dot_product_attention``, torch's or genkit's, is weakened for the image, whichever processor calls it."""

    def __init__(self, perturbation: Perturbation, tokens: Tokens, image: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.perturbation, self.tokens, self.image, self.shape, self.used = perturbation, tokens, image, shape, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTIONS:
            return func(*args, **(kwargs or {}))
        self.used = True
        return self.attend(func, *args, **(kwargs or {}))

    def attend(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n, length = self.image, query.shape[-2]
        start = length - n if self.tokens == "last" else 0
        if self.perturbation.kind == "identity":
            if n == length:
                return value
            out = func(query, key, value, *args, **kwargs)
            return torch.cat([out[..., :start, :], value[..., start : start + n, :], out[..., start + n :, :]], -2)
        height, width = self.grid(n)
        blurred = perturb.blur_queries(query[..., start : start + n, :], height, width, self.perturbation.sigma)
        query = torch.cat([query[..., :start, :], blurred, query[..., start + n :, :]], -2)
        weakened: Tensor = func(query, key, value, *args, **kwargs)
        return weakened

    def grid(self, n: int) -> tuple[int, int]:
        """Height and width of the tokens, the image being reduced by a power of 2."""
        if self.perturbation.sigma == float("inf"):
            return n, 1
        height, width = self.shape[-2:] if len(self.shape) == 4 else (0, 0)
        for k in range(8):
            h, w = -(-height // 2**k), -(-width // 2**k)
            if h * w == n:
                return h, w
        raise ValueError(
            f"sigma={self.perturbation.sigma:g}: {n} tokens do not lie on a grid of an image of shape {self.shape}; use sigma=inf"
        )


__all__ = ["BLOCKS", "weaken"]
