"""Numbers out of a pickle without running any of it.

A pickle is a program that may call whatever it names. Here every name but the handful that numpy arrays are made of is refused,
and those stand for the classes below: no function of numpy is handed a state that the file chose, because numpy trusts what it
unpickles (an array of objects can be given raw bytes for pointers).
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, Any]


class _Type:
    """Stands for ``numpy.dtype``: numbers of a fixed size alone."""

    def __init__(self, code: str, *_rest: Any) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in "biuf" or self.dtype.shape:
            raise pickle.UnpicklingError(f"an array of {code!r}, which are not numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array that is being put together."""

    value: Array

    def __init__(self, *_ignored: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, fortran, content = state
        self.value = _array(content, kind, shape, "F" if fortran else "C")


class _Class:
    """Stands for the class ``numpy.ndarray``, which is named and never called."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise pickle.UnpicklingError(f"{type(value).__name__} where a text was expected")
    return value


def _array(content: Any, kind: Any, shape: Any, order: Any) -> Array:
    if not isinstance(content, (bytes, bytearray)) or not isinstance(kind, _Type) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array that is not numbers in plain bytes")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise pickle.UnpicklingError(f"an array of shape {sizes}")
    if math.prod(sizes) * kind.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"{len(content)} bytes for an array {sizes} of {kind.dtype}")
    flat = np.frombuffer(bytes(content), kind.dtype)
    return np.array(flat.reshape(sizes, order="F" if order == "F" else "C"))


def _frombuffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.value = _array(content, kind, shape, order)
    return made


def _scalar(kind: Any, content: Any) -> float | int:
    number: float | int = _array(content, kind, (), "C").item()
    return number


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return _text(text).encode("latin1")


# numpy 1 and numpy 2 name the same things differently.
_ALLOWED: dict[tuple[str, str], Callable[..., Any] | type] = {
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; UnpicklingError for any that numpy arrays are not made of."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code and not numbers")
        return _ALLOWED[(module, name)]


def _plain(value: Any) -> Any:
    """Arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner) for inner in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")


def load_numbers(file: BinaryIO | bytes) -> Any:
    """Dicts, lists, numbers, texts and numpy arrays of numbers from a pickle; nothing that the file names is executed.

    Raises ValueError when it holds anything else or is damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(file) if isinstance(file, bytes) else file).load())
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"not a pickle of numbers: {error}") from None


def load_torch(path: str) -> Any:
    """What ``torch.save`` wrote: tensors by torch's own reader of weights, numpy arrays by ``load_numbers``.

    Raises ValueError when it holds anything else, OSError when it cannot be opened.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # numpy arrays are refused in it, and damage may raise anything
        reason = str(error).split("\n")[0]
    if not zipfile.is_zipfile(path):
        raise ValueError(f"not a torch file of numbers: {reason}")
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            raise ValueError("a zip without data.pkl, so not a torch file")
        return load_numbers(archive.read(name))
