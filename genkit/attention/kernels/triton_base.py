"""Triton, for the modules that hold its programs: to be imported by nothing else, so that Triton is needed only where it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

#: Of every launch. What is multiplied and then added is rounded twice, as in torch; the passes wait for memory all the same.
EXACT = {"enable_fp_fusion": False}

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl.constexpr  # marks arguments that a program is compiled for


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, with a type."""
    return triton.jit(function)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
