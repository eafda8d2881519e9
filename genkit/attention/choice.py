"""Which backend computes attention: what the call asks for, the context, the network, the environment, or the best that can."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

import torch
from torch import nn

from genkit.attention import backends as _backends  # noqa: F401  (importing them registers them)
from genkit.attention.base import AUTOMATIC, BACKENDS, REASONS, AttentionBackend, Request, Unavailable

AUTO = "auto"
VARIABLE = "GENKIT_ATTENTION"

_context: ContextVar[str | None] = ContextVar("attention_backend", default=None)
# torch.compile cannot read a context variable. It can read this, and compiles anew in a thread where it says otherwise.
_traced = threading.local()
# Read here, since what is read while a function is compiled is read again after it. Whether it can be used, its first use tells.
_environment = os.environ.get(VARIABLE) or AUTO


@contextmanager
def use_attention(backend: str) -> Iterator[None]:
    """Inside, attention is computed by this backend, in this thread or task; of nested ones the innermost counts.

    Args:
        backend: a name of :data:`BACKENDS`, or "auto" for the best that can do a call.

    Raises:
        Unavailable: no such backend, or it cannot be used on this machine.
    """
    check(backend, f"use_attention({backend!r})")
    token, before = _context.set(backend), getattr(_traced, "name", None)
    _traced.name = backend
    try:
        yield
    finally:
        _context.reset(token)
        if before is None:
            del _traced.name  # None in its place would be compiled for once more
        else:
            _traced.name = before


def set_attention(network: nn.Module, backend: str | None) -> None:
    """From now on this network asks for a backend, where neither a call nor :func:`use_attention` does.

    Args:
        network: one whose attention layers have an attribute ``attention_backend``, as all of genkit's have.
        backend: a name of :data:`BACKENDS`, or "auto"; None takes back what was set.

    Raises:
        Unavailable: no such backend, or it cannot be used on this machine.
        ValueError: the network has no such layer.
    """
    if backend is not None:
        check(backend, f"backend={backend!r}")
    layers = [layer for layer in network.modules() if hasattr(layer, "attention_backend")]
    if not layers:
        raise ValueError(
            f"network is a {type(network).__name__}, of which no layer has the attribute attention_backend: it does not compute "
            "attention through genkit.attention"
        )
    for layer in layers:
        layer.attention_backend = backend  # type: ignore[assignment]


def asked(backend: str | None, default: str | None) -> str:
    """The name that counts: the call's, the context's, the network's, the environment's, or "auto"."""
    if backend:
        return backend
    context = getattr(_traced, "name", None) if torch.compiler.is_compiling() else _context.get()
    return context or default or _environment


def check(name: str, said: str) -> None:
    """Raises :class:`Unavailable`, beginning with ``said``, unless the backend exists and can be used on this machine."""
    if name == AUTO:
        return
    # What is optional is not tried here: to say so would import it.
    usable = [AUTO, *(n for n, b in BACKENDS.items() if not b.optional and reason(n) is None)]
    if name not in BACKENDS:
        others = [n for n in BACKENDS if n not in usable]
        raise Unavailable(
            f"{said} is no attention backend; use {', '.join(usable)}; or, if they can be used here, {', '.join(others)}"
        )
    if why := reason(name):
        raise Unavailable(f"{said} cannot be used: {why}. Use {', '.join(usable)}")


def reason(name: str) -> str | None:
    """Why a backend cannot be used on this machine; None if it can. One that is broken is reported once, by a warning."""
    if name not in REASONS:
        try:
            REASONS[name] = BACKENDS[name].available()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            REASONS[name] = f"it is broken: {type(error).__name__}: {lines[0]}"
            warnings.warn(f"attention backend {name!r} is skipped: {REASONS[name]}", RuntimeWarning, stacklevel=2)
    return REASONS[name]


def best(request: Request) -> AttentionBackend:
    """The backend for a call that asks for none: ``sdpa``, unless another says that it does this one better."""
    traced = torch.compiler.is_compiling()
    for backend in AUTOMATIC:
        usable = backend.automatic(request) and backend.exact and backend.supports(request) is None
        if usable and (traced or reason(backend.name) is None):
            return backend
    return BACKENDS["sdpa"]


def named(name: str, request: Request) -> AttentionBackend:
    """The backend of this name.

    Raises:
        Unavailable: there is none, or it cannot do this call.
    """
    backend = BACKENDS.get(name)
    # What is traced by torch.compile cannot import: there a backend is taken at its word.
    if backend is None or (not torch.compiler.is_compiling() and REASONS.get(name, "not tried") is not None):
        check(name, f"{VARIABLE}={name}" if name == _environment else f"attention backend {name!r}")
        backend = BACKENDS[name]
    if why := backend.supports(request):
        able = [n for n, b in BACKENDS.items() if not b.optional and REASONS.get(n) is None and b.supports(request) is None]
        raise Unavailable(f"attention backend {name!r} cannot do this call: {why}. Use {', '.join([AUTO, *able])}")
    return backend


def overrides(network: nn.Module) -> dict[str, str]:
    """Layers of a network that ask for a backend, see :func:`set_attention`, by name."""
    found = ((name, getattr(layer, "attention_backend", None)) for name, layer in network.named_modules())
    return {name: backend for name, backend in found if backend}


def chosen(*networks: nn.Module) -> dict[str, Any]:
    """What a run should record: the backend asked for here, by whom, versions, and what ``networks`` ask for themselves."""
    context = _context.get()
    name = context or _environment
    by = "use_attention" if context else VARIABLE if name != AUTO else "default"
    found: dict[str, Any] = {"backend": name, "asked_by": by, "torch": torch.__version__}
    own = sorted({backend for network in networks for backend in overrides(network).values()})
    if own:
        found["networks_ask_for"] = own
    versions = {n: _version(BACKENDS[n]) for n in {name, *own} if n in BACKENDS}
    found.update({f"{n}_version": version for n, version in sorted(versions.items()) if version})
    return found


def _version(backend: AttentionBackend) -> str | None:
    try:
        return backend.version()
    except ImportError:  # not installed, or a folder on the path without metadata
        return None


def report(file: TextIO | None = None) -> None:
    """Print every backend: whether it can be used on this machine, why not, and what it is for. It tries the optional ones."""
    rows = [(name, reason(name), backend) for name, backend in BACKENDS.items()]
    width = max(len(name) for name, _, _ in rows)
    out = file or sys.stdout
    print(f"attention: {chosen()}", file=out)
    for name, why, backend in rows:
        note = backend.note + ("" if backend.exact else " (approximate: only by name)")
        print(f"  {name:<{width}}  {'yes' if why is None else 'no '}  {note}" + (f"; not here: {why}" if why else ""), file=out)
