"""Ways to weaken a network in some of its layers, for guidance away from the weakened prediction."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import attention as attend
from genkit.guidance.base import Perturbation

# A context variable, not an attribute of the layers: other threads that use the same network do not see it.
_ACTIVE: ContextVar[Mapping[nn.Module, Perturbation]] = ContextVar("perturbed_layers", default=MappingProxyType({}))
# torch.compile cannot read a context variable. It can read this, and compiles anew where there is one to read.
_traced = threading.local()


@contextmanager
def weakened(layers: Collection[nn.Module], perturbation: Perturbation) -> Iterator[None]:
    """Inside, :func:`active` names the perturbation to these layers, in this thread; of nested ones the innermost counts."""
    token = _ACTIVE.set({**_ACTIVE.get(), **dict.fromkeys(layers, perturbation)})
    outermost = not hasattr(_traced, "weakened")
    _traced.weakened = True
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        if outermost:
            del _traced.weakened


def active(layer: nn.Module) -> Perturbation | None:
    """How the layer is weakened at present."""
    if torch.compiler.is_compiling() and not hasattr(_traced, "weakened"):
        return None
    return _ACTIVE.get().get(layer)


def anything() -> bool:
    """Whether any layer is weakened at present."""
    return bool(_ACTIVE.get())


def select(layers: Mapping[str, nn.Module], wanted: tuple[str, ...]) -> list[nn.Module]:
    """The layers of these names; ``"down"`` stands for every ``"down. ..."``. Raises ValueError that lists the names."""
    found: dict[nn.Module, None] = {}
    for name in wanted:
        some = [layer for known, layer in layers.items() if f"{known}.".startswith(f"{name}.")]
        if not some:
            raise ValueError(f"layers contains {name!r}, which this network does not have; it has {', '.join(layers) or 'none'}")
        found.update(dict.fromkeys(some))
    return list(found)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    perturbation: Perturbation | None = None,
    default: str | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over (B, heads, height * width, d), weakened: ``v`` ("identity"), blurred q ("blur")."""
    if perturbation is not None and perturbation.kind == "identity":
        return v
    if perturbation is not None and perturbation.kind == "blur":
        q = blur_queries(q, height, width, perturbation.sigma)
    return attend(q, k, v, default=default)


def blur_queries(query: Tensor, height: int, width: int, sigma: float = math.inf) -> Tensor:
    """Queries (B, heads, height * width, d), row by row from the top left, blurred over the grid (Hong 2024, sec. 4).

    A Gaussian of ``ceil(6 sigma)`` taps, made odd; along each axis at most its length, made odd upwards. Borders are reflected
    without repeating the outermost token.

    Args:
        sigma: in token widths, above 0; inf is the mean over the grid.

    Raises:
        ValueError: the tokens do not make the grid, or sigma is not above 0.
    """
    if query.shape[-2] != height * width:
        raise ValueError(f"query has {query.shape[-2]} tokens, which is not height={height} x width={width}")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma!r} must be above 0 (inf is the mean over the grid)")
    if math.isinf(sigma):
        return query.mean(-2, keepdim=True).expand_as(query)
    rows, columns = (_blur_matrix(n, sigma).to(query) for n in (height, width))
    grid = columns @ query.unflatten(-2, (height, width))
    blurred: Tensor = (rows @ grid.flatten(-2)).unflatten(-1, grid.shape[-2:]).flatten(-3, -2)
    return blurred


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n): times a column of n values it is the column blurred."""
    half = min(math.ceil(min(6 * sigma, n)) // 2, n // 2)
    kernel = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) / sigma).square() / 2)
    unit = F.pad(torch.eye(n, dtype=torch.float64)[None], (half, half), mode="reflect")[0]
    return (unit.unfold(1, 2 * half + 1, 1) @ (kernel / kernel.sum())).mT
