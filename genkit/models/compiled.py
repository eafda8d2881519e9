"""Parts of networks run by ``torch.compile``: those whose shapes stay the same, or differ in one length only, from step to step.

What changes with every step stays outside: the cache, where it is written, the mask, and with them attention, which a compiled
part calls as one opaque operation. So a part is compiled once for all steps. On CUDA this operation is left out of CUDA graphs.
Where layers are weakened, or gradients are wanted, the network runs as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genkit.attention import Mask, attention
from genkit.models import perturb
from genkit.models.autoregressive import LayerCache

#: Parts are compiled for so many shapes (of batches); others run as they are.
MOST_SHAPES = 8


class Region(NamedTuple):
    """A method of a network to be compiled.

    Attributes:
        owner, method: the module, and the method's name.
        length: "fixed": it is compiled for every shape, and "each" too, of which there are several in a run. "one" and "many" are
            for positions, dimension 1 of the first argument: it is compiled for one position alone, or once for any number of
            them above 1.
        inside: what stands in for its last arguments inside: :data:`INSIDE` for a :class:`LayerCache` (or None) and a mask.
            What they are does not matter to what is compiled.
    """

    owner: nn.Module
    method: str
    length: Literal["fixed", "each", "one", "many"] = "fixed"
    inside: tuple[Any, ...] = ()


class _Outside:
    """Stands in for a cache inside of what is compiled."""

    def update(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor, /) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


OUTSIDE = _Outside()
INSIDE = (LayerCache(OUTSIDE, 0, 0), None)
_place: ContextVar[tuple[LayerCache | None, Mask | Tensor | None]] = ContextVar("place_in_cache", default=(None, None))
_eager: ContextVar[bool] = ContextVar("run_as_it_is", default=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache | None,
    mask: Mask | Tensor | None,
    scale: float | None = None,
    default: str | None = None,
) -> Tensor:
    """:func:`genkit.attention.attention` over what the cache holds and the new k and v, which are written to it."""
    if cache is not None and cache.cache is OUTSIDE:
        out: Tensor = torch.ops.genkit.attend(q, k, v, cache.layer, scale, default)
        return out.transpose(1, 2)
    keys, values = (k, v) if cache is None else cache(k, v)
    return attention(q, keys, values, mask=mask, scale=scale, default=default)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float | None, default: str | None) -> Tensor:
    cache, mask = _place.get()
    here = cache if cache is None else cache._replace(layer=cache.layer + layer)
    return attend(q, k, v, here, mask, scale, default).transpose(1, 2).contiguous()


# Defined by hand: custom_op would check every call, which costs as much as the attention of a step.
_library = torch.library.Library("genkit", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, float? scale, str? default) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")


def _like(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float | None, default: str | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


torch.library.register_fake("genkit::attend", _like, lib=_library)


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, in this thread, nothing compiled is used."""
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


class Compiled:
    """A method of a network, compiled for each shape when it first comes by. See :func:`compile_regions`."""

    def __init__(self, function: Callable[..., Any], region: Region, options: dict[str, Any], freeze: bool) -> None:
        self.function, self.length, self.inside = function, region.length, region.inside
        self.what = f"{type(region.owner).__name__}.{region.method}"
        self.options, self.freeze = options, freeze
        self.replaced = region.method in region.owner.__dict__
        self.shapes: set[tuple[Any, ...]] = set()
        self._run: Callable[..., Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        new = copy.copy(self)
        new.function, new.shapes, new._run = copy.deepcopy(self.function, memo), set(), None
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shapes": set(), "_run": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _eager.get() or perturb.anything() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        if self.length in ("one", "many") and (args[0].shape[1] == 1) != (self.length == "one"):
            return self.function(*args, **kwargs)
        shape = tuple(self._shape(args, kwargs))
        new = shape not in self.shapes
        if new and len(self.shapes) == MOST_SHAPES:
            warnings.warn(
                f"{self.what} is compiled for {MOST_SHAPES} shapes already; others, from {shape[0]} on, run without", stacklevel=2
            )
            self.shapes.add(())  # said once
        if new and len(self.shapes) >= MOST_SHAPES:
            return self.function(*args, **kwargs)
        if not self.inside:
            return self._compiled(shape, new, *args, **kwargs)
        token = _place.set(args[-2:])
        try:
            return self._compiled(shape, new, *args[: -len(self.inside)], *self.inside)
        finally:
            _place.reset(token)

    def _compiled(self, shape: tuple[Any, ...], new: bool, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            # Blocks that are alike share what is compiled; parts of fixed shape have room for shapes of their own.
            alike: dict[str, Any] = {"dynamic": None} if self.length == "many" else {"dynamic": False, "isolate_recompiles": True}
            self._run = torch.compile(self.function, **{"recompile_limit": 2 * MOST_SHAPES, **alike, **self.options})
        if self.length == "many":
            torch._dynamo.mark_dynamic(args[0], 1)
        graphs = self.options.get("mode") == "reduce-overhead" and any(
            isinstance(value, Tensor) and value.is_cuda for value in torch.utils._pytree.tree_leaves((args, kwargs))
        )
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch._inductor.config.patch(freezing=True) if new and self.freeze else nullcontext():
            out = self._run(*args, **kwargs) if not new else self._first(*args, **kwargs)
        self.shapes.add(shape)
        return torch.utils._pytree.tree_map(_copied, out) if graphs else out  # the next replay writes over its memory

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        assert self._run is not None
        try:
            return self._run(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(
                f"{self.what} cannot be compiled here: {' '.join(said[:2])}. Use the pipeline without compile(), undo it with "
                "compile(backend=None), or try compile(backend='aot_eager')"
            ) from error

    def _shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        first = True
        for value in torch.utils._pytree.tree_leaves((args[: len(args) - len(self.inside)], kwargs)):
            if isinstance(value, Tensor):
                shape = value.shape if not first or self.length != "many" else (*value.shape[:1], *value.shape[2:])
                yield (*shape, value.dtype, value.device)
                first = False
            else:
                yield value


def compile_regions(
    network: nn.Module,
    backend: str | Callable[..., Any] | None = "inductor",
    mode: str | None = None,
    freeze: bool | None = None,
    **options: Any,
) -> None:
    """Have ``torch.compile`` make the parts of a network faster that it names (``regions()``), or else its ``forward``.

    Nothing is compiled until they first run. What is compiled already stays, unless it is asked for in another way.

    Args:
        network: in evaluation mode, on its device.
        backend: of ``torch.compile``; None undoes what was compiled.
        mode: of ``torch.compile``; None is "reduce-overhead" (CUDA graphs) on CUDA, else its default.
        freeze: take the weights for constants, and keep a second copy of them for each shape, laid out for it; None: on the CPU,
            for parts of fixed shape. Weights that are changed later are not seen.
        options: more of ``torch.compile``'s arguments.

    Raises:
        ValueError: not a network of torch, or a backend that torch does not have.
    """
    if isinstance(backend, str) and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f"backend={backend!r} is none of torch.compile's: {', '.join(torch.compiler.list_backends())}")
    if not isinstance(network, nn.Module):
        raise ValueError(f"compile() is for networks of torch (nn.Module), but {network!r} is none")
    device = next((value.device.type for value in network.parameters()), "cpu")
    options = {key: value for key, value in options.items() if value is not None}
    if backend == "inductor":
        mode = mode or ("reduce-overhead" if device == "cuda" and "options" not in options else None)
    options = {"backend": backend, **({} if mode is None else {"mode": mode}), **options}
    for region in regions_of(network):
        cold = region.length in ("fixed", "one") and backend == "inductor" and (device == "cpu" if freeze is None else freeze)
        before = region.owner.__dict__.get(region.method)
        if isinstance(before, Compiled):
            if backend is not None and (before.options, before.freeze) == (options, cold):
                continue
            if before.replaced:  # a hook, as of offloading
                setattr(region.owner, region.method, before.function)
            else:
                delattr(region.owner, region.method)
        if backend is not None:
            setattr(region.owner, region.method, Compiled(getattr(region.owner, region.method), region, options, cold))


def regions_of(network: nn.Module) -> Iterable[Region]:
    """The parts that a network names, or its ``forward``."""
    found: Iterable[Region] = network.regions() if hasattr(network, "regions") else [Region(network, "forward")]  # type: ignore[operator]
    return found


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
