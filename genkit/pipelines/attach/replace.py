"""A method of a module taken over for a while; several may do so at a time, each in its own thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Answer = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
_changing = threading.Lock()


class _Layer:
    """Stands for a method: this thread's calls are answered, those of others go to what was there before."""

    below: Callable[..., Any]
    own: bool

    def __init__(self, module: nn.Module, name: str, answer: Answer) -> None:
        below = original = getattr(module, name)
        while isinstance(original, _Layer):
            original = original.below
        functools.update_wrapper(self, original)
        self.below, self.own, self.original = below, name in module.__dict__, original
        self.answer, self.thread = answer, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.below(*args, **kwargs)
        return self.answer(self.original, args, kwargs)


@contextmanager
def replaced(module: nn.Module, name: str, answer: Answer) -> Iterator[None]:
    """Inside, this thread's calls of the method go to ``answer(original, args, kwargs)``; put back in whichever order they end.

    ``original`` lies below all who have taken it over: two pipelines around one network do not guide each other's predictions.
    """
    with _changing:
        layer = _Layer(module, name, answer)
        setattr(module, name, layer)
    try:
        yield
    finally:
        with _changing:
            _remove(module, name, layer)


def _remove(module: nn.Module, name: str, layer: _Layer) -> None:
    above = module.__dict__.get(name)
    if above is layer:
        if layer.own:
            setattr(module, name, layer.below)
        else:
            delattr(module, name)
    while isinstance(above, _Layer):  # else offloading has put its own hooks back in the meantime
        if above.below is layer:
            above.below, above.own = layer.below, layer.own
        above = above.below


__all__ = ["replaced"]
