"""When a Triton program takes the place of plain torch, and what happens where it cannot."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

#: Triton's interpreter runs the programs on the CPU, slowly, to check them. To be set before triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Programs that are off, and those that have been compared with plain torch, by name and dtype.
_broken: set[str] = set()
_compared: set[tuple[str, torch.dtype]] = set()

T = TypeVar("T")


def usable(*tensors: Tensor | None) -> bool:
    """Whether a Triton program can take these tensors: values on one CUDA device, no gradient wanted, not inside torch.compile.

    ``GENKIT_KERNELS=0`` in the environment turns the programs off. torch.compile fuses the plain way itself.
    """
    first = tensors[0]
    if first is None or not (first.is_cuda or INTERPRETED) or torch.compiler.is_compiling() or first.numel() == 0:
        return False
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    same = all(t.device == first.device and t.dtype in DTYPES for t in given)
    return same and os.environ.get("GENKIT_KERNELS", "1") != "0"


def fused(name: str, plain: Callable[[], T], first: Tensor, *args: Any) -> T:
    """What ``run(first, *args)`` of the module ``triton_<name>`` returns; ``plain()`` where Triton is missing, fails or errs.

    The first call in a dtype is computed both ways: a program that disagrees with plain torch on this device is turned off. That
    is said once, as a failure is.
    """
    if name in _broken:
        return plain()
    try:
        program = importlib.import_module(f"{__package__}.triton_{name}")
        with torch.cuda.device_of(first):
            done: T = program.run(first, *args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if INTERPRETED:  # this is a check of the programs: a fallback would hide what it is to find
            raise
        return _off(name, f"{type(error).__name__}: {error}".splitlines()[0], plain())
    key = (name, first.dtype)
    # What a CUDA graph records must not read a result.
    if INTERPRETED or key in _compared or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return done
    expected = plain()
    if not agree(done, expected):
        return _off(name, "its results are not those of plain torch on this device", expected)
    _compared.add(key)
    return done


def _off(name: str, reason: str, result: T) -> T:
    _broken.add(name)
    warnings.warn(f"the Triton kernel {name!r} is off, plain torch takes its place: {reason}", RuntimeWarning, stacklevel=4)
    return result


def agree(found: Any, expected: Any) -> bool:
    """Whether two results are the same but for rounding: 1e-4 of the norm, 2e-2 in half precision; of drawn tokens 19 in 20."""
    if isinstance(expected, tuple):
        return all(agree(a, b) for a, b in zip(found, expected, strict=True))
    if not isinstance(expected, Tensor):
        return found is expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return bool((found == expected).float().mean() >= 0.95)
    limit = 1e-4 if expected.dtype is torch.float32 else 2e-2
    wide = torch.nan_to_num(expected.float())
    return bool((torch.nan_to_num(found.float()) - wide).norm() <= limit * wide.norm())


def floating(function: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for an argument that is no tensor of floating-point numbers, by its name; None is left out."""
    for name, value in tensors.items():
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{function}: {name} is {got}, but must be a tensor of floating-point numbers")


def shaped(function: str, name: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless the argument has one of the shapes."""
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, but must have {' or '.join(map(str, shapes))}")


def expandable(function: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The argument as a view of this shape. Raises ValueError where it cannot be broadcast to it."""
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{function}: {name} of shape {tuple(value.shape)} cannot be broadcast to {shape}") from None


def working(*tensors: Tensor) -> list[Tensor]:
    """In float32 at least."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
