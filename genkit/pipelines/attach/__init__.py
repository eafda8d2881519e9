"""Any guidance on an unmodified diffusers pipeline: :func:`attach`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from genkit.denoiser import TraceLevel
from genkit.guidance import Guidance, Trace
from genkit.pipelines.attach.adapters import Adapter, find
from genkit.pipelines.attach.session import Session
from genkit.pipelines.diffusion import as_guidance
from genkit.random import check_seeds
from genkit.samplers.diffusion.scheduler_levels import state_of

REASONS = {
    "direction": "it names another direction of the step, which the pipeline's scheduler does not know (CFG++ has a form "
    "without: CFGPP(strength, 'schedule'), the same in first-order samplers)",
    "corrector": "it moves x between the steps of the scheduler",
}


@dataclass
class Run:
    """What the calls of a pipeline under :func:`attach` cost.

    Attributes:
        nfe: network rows evaluated for each image, over all calls of the pipeline.
        calls: forward passes of the network.
        trace: one row per guided evaluation.
    """

    nfe: list[int] = field(default_factory=list)
    calls: int = 0
    trace: Trace = field(default_factory=Trace)


@contextmanager
def attach(
    pipe: Any,
    guidance: Guidance | str | float | None,
    negative: str | Sequence[str] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    models: Mapping[str, Any] | None = None,
    trace: TraceLevel = "basic",
) -> Iterator[Run]:
    """Inside, ``pipe(...)`` is guided by ``guidance`` in place of the pipeline's own CFG; afterwards ``pipe`` is as it was.

    ``with attach(pipe, "Interval(CFG(7.5), 0.28, 5.42)") as run: image = pipe("a fox").images[0]``. The pipeline has to be called
    with its own guidance switched on (``guidance_scale`` above 1, for Flux and Qwen-Image ``negative_prompt`` and
    ``true_cfg_scale``): it prepares the unconditional branch; the size of that number has no effect. The network is evaluated
    for exactly the rows the guidance plans.

    Args:
        pipe: a diffusers pipeline of a supported family; its components and their hooks stay as they are.
        guidance: object, expression, a number w (short for CFG(w)), or None for none.
        negative: the negative prompt of calls that give neither negative_prompt nor negative_prompt_embeds.
        seeds: one integer per image of a call, for guidances that draw random numbers; the same for every call.
        models: further models a guidance asks for by name, for example ``{"weak": unet}``; a network of the pipeline's own class
            is called with the pipeline's arguments.
        trace: ``"none"``, ``"basic"`` or ``"full"``.

    Raises:
        ValueError: an unknown pipeline or scheduler, a pipeline that is attached already, a guidance that needs what a pipeline
            cannot offer, arguments of the pipeline that would change its guidance in another way, or no unconditional branch.
    """
    adapter, rule = find(pipe), as_guidance(guidance)
    _check(pipe, rule, seeds, trace)
    cls, run = type(pipe), Run()
    call = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = call.bind(self, *args, **kwargs)
        if negative is not None:
            _give(bound, call, negative)
        arguments = {**{n: p.default for n, p in call.parameters.items()}, **bound.arguments}
        _refuse(adapter, arguments)
        state_of(self.scheduler)  # refuses others before anything is computed
        session = Session(self, adapter, arguments, rule, seeds, models or {}, trace)
        with session.installed():
            out = cls.__call__(*bound.args, **bound.kwargs)
        if session.guided is not None:
            run.nfe.extend(session.guided.ledger.nfe)
            run.calls += session.guided.network.calls
            run.trace.extend(session.guided.trace)
        return out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        original: Any = cls
        made = original.__reduce_ex__(self, protocol)
        return (_new, (cls,), *made[2:])  # a copy is not attached

    # Python looks __call__ up in the class, so the pipeline changes its class for a while.
    body: dict[str, Any] = {"__call__": __call__, "__module__": cls.__module__, "__doc__": cls.__doc__, "_genkit_attached": True}
    body["__reduce_ex__"] = __reduce_ex__
    pipe.__class__ = type(cls.__name__, (cls,), body)
    try:
        yield run
    finally:
        pipe.__class__ = cls


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _check(pipe: Any, guidance: Guidance, seeds: Sequence[int] | None, trace: TraceLevel) -> None:
    if trace not in ("none", "basic", "full"):
        raise ValueError(f"trace={trace!r}: use 'none', 'basic' or 'full'")
    if seeds is not None:
        check_seeds(seeds)
    if getattr(pipe, "_genkit_attached", False):
        raise ValueError("pipe is attached already: leave that attach first, or combine the guidances into one expression")
    for need, reason in REASONS.items():
        if need in guidance.needs:
            raise ValueError(f"{guidance!r} cannot be attached to a pipeline: {reason}; use a sampler of genkit for it")
    if "noise" in guidance.needs and seeds is None:
        raise ValueError(f"seeds=None, but {guidance!r} draws random numbers: give one seed per image")


def _give(bound: inspect.BoundArguments, call: inspect.Signature, negative: str | Sequence[str]) -> None:
    if "negative_prompt" not in call.parameters:
        raise ValueError(f"negative={negative!r}: this pipeline takes no negative prompt; leave it out")
    if bound.arguments.get("negative_prompt") is None and bound.arguments.get("negative_prompt_embeds") is None:
        bound.arguments["negative_prompt"] = negative


def _refuse(adapter: Adapter, arguments: Mapping[str, Any]) -> None:
    low = arguments.get("guidance_scale_2")
    if low is not None and low != arguments["guidance_scale"]:
        raise ValueError(f"guidance_scale_2={low!r} has no effect under attach: leave it out and use Piecewise")
    for name, acts, instead in adapter.refused:
        if name in arguments and acts(arguments[name]):
            raise ValueError(
                f"{name}={arguments[name]!r} has no effect under attach, whose guidance takes the place of the pipeline's: "
                f"leave it out and use {instead}"
            )


__all__ = ["Run", "attach"]
