"""One call of a pipeline under a guidance: its network's forward taken over, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit import noise
from genkit.denoiser import MissingCondition, TraceLevel
from genkit.guidance.base import Guidance, StepInfo
from genkit.guidance.norm_matched import NormMatched
from genkit.pipelines.attach.adapters import Adapter, Arguments
from genkit.pipelines.attach.call import Call, Layout, layout, parameters, unwrapped
from genkit.pipelines.attach.guided import Attached
from genkit.pipelines.attach.network import Network
from genkit.pipelines.attach.replace import Answer, replaced
from genkit.pipelines.course import Course, Place
from genkit.pipelines.raw import in_any_space


class Deferred:
    """Stands for the residuals of a ControlNet, which is evaluated with the network, for the rows that are then asked for."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Session:
    """The state of one ``pipe(...)``: which calls came, where the scheduler stands, the run of the guidance.

    Args:
        pipe, adapter, arguments: the pipeline, what is known of its family, and how it was called.
        guidance: any guidance.
        seeds, models, trace: as for :func:`genkit.attach`.
    """

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        arguments: Arguments,
        guidance: Guidance,
        seeds: Sequence[int] | None,
        models: Mapping[str, Any],
        trace: TraceLevel,
    ) -> None:
        self.pipe, self.adapter, self.arguments = pipe, adapter, arguments
        self.guidance = guidance
        self.seeds, self.models, self.trace = seeds, models, trace
        self.guided: Attached | None = None
        self.held: tuple[Call, Tensor] | None = None  # the first of two calls, and what it was answered
        self.evaluating = False
        self.layout: Layout | None = None  # of the network's input, once it is known

    # ---- taking over ----

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the pipeline's networks answer with guided predictions. They are put back however it ends."""
        with ExitStack() as stack:
            for name in self.adapter.denoisers:
                module = getattr(self.pipe, name, None)
                if module is not None:
                    self._check(name, module)
                    stack.enter_context(_replaced(module, functools.partial(self._denoise, module, parameters(module))))
            control = getattr(self.pipe, self.adapter.control) if self.adapter.control else None
            if control is not None and not self.arguments.get("guess_mode") and not _pooled(control):
                stack.enter_context(_replaced(control, functools.partial(self._defer, control, parameters(control))))
            yield
        if self.held is not None:
            raise RuntimeError("the pipeline ended between the two calls of a step: genkit.attach does not know this pipeline")
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if self.guided is None and timesteps is not None and len(timesteps):
            raise RuntimeError(
                f"the pipeline called none of {', '.join(self.adapter.denoisers)} through its forward, so nothing was guided: "
                f"genkit.attach does not know this pipeline"
            )

    def _check(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"pipe.{name} is a {type(module).__name__}, no nn.Module, so its calls cannot be taken over: put the network "
                f"of diffusers there"
            )
        self.adapter.check_mode(name, module)
        if getattr(unwrapped(module), "is_cache_enabled", False):
            raise ValueError(
                f"pipe.{name} caches features between steps, which a guidance that skips evaluations would make stale: "
                f"call pipe.{name}.disable_cache()"
            )

    def _denoiser(self) -> nn.Module:
        """The first of the pipeline's networks that it has."""
        networks = (getattr(self.pipe, name, None) for name in self.adapter.denoisers)
        found: nn.Module = next(network for network in networks if network is not None)
        return found

    # ---- the calls of the pipeline ----

    def _defer(
        self, module: nn.Module, names: tuple[str, ...], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments
    ) -> Any:
        arguments = dict(zip(names, args, strict=False), **kwargs)
        call = Call(self.adapter, module, forward, arguments, self.layout or self._layout(arguments))
        return Deferred(call), Deferred(call)

    def _denoise(
        self, module: nn.Module, names: tuple[str, ...], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments
    ) -> Any:
        if self.evaluating:  # the guidance itself calls the network, as a model of another name
            return forward(*args, **kwargs)
        arguments = {**kwargs}
        if args:
            arguments.update(zip(names, args, strict=False))
        if arguments.get("skip_layers") is not None:
            raise ValueError("skip_layers: the pipeline's own layer skipping is not compatible with attach")
        residual = None if self.adapter.control is None else arguments.get("mid_block_additional_residual")
        control = residual.call if isinstance(residual, Deferred) else None
        form = self.layout or self._layout(arguments)
        call = Call(self.adapter, module, forward, arguments, form, control)
        if self.guided is None:
            self._begin(call)
        own = self.pipe.__dict__
        if (own.get("_guidance_scale"), own.get("_guidance_rescale")) != self.scales or call.whole.shape[0] != self.rows:
            raise self._changed(call)
        place = self.course.place(arguments[self.adapter.timestep], again=self.held is not None)
        if not self.paired:
            raw = self._guide(place, call)
            whole = torch.cat((raw, raw)) if self.doubled else raw
            return self._output(call, whole if form.plain else form.padded(whole))
        _ = call.batched  # the pipeline may change the call's containers before the second
        if self.held is None:
            self.held = call, torch.empty_like(form.padded(call.x))
            return self._output(call, self.held[1])
        (first, answer), self.held = self.held, None
        answer.copy_(form.padded(self._guide(place, first, call)))
        return self._output(call, answer)

    def _guide(self, place: Place, *calls: Call) -> Tensor:
        """The guided prediction for the images of one call, or of two, in the space and with the sign of the network's."""
        first, guided, course = calls[0], self.guided, self.course
        assert guided is not None
        x = first.x if self.half is None else first.x[self.half]
        guided.at(place, calls, whole=self.half is not None and first.control is None)
        info = StepInfo(*place, x.float() if self.low else x)
        self.evaluating = True
        try:
            result = guided(info)
        except MissingCondition as error:
            raise ValueError(self._missing(str(error))) from error
        finally:
            self.evaluating = False
        raw = result.denoised if result.score is None else result.absorbed(info).denoised
        if not guided.network.raw:
            raw = noise.from_x0(raw, info.x, info.alpha, info.s, course.space)
            raw = raw if self.adapter.sign == 1 else -raw
        if raw.dtype != x.dtype:
            raw = raw.to(x.dtype)
        if self.normed:  # the pipeline divides by the norm of each token
            raw = torch.where(raw.abs().amax(-1, keepdim=True) > 0, raw, _tiny(raw.dtype))
        return raw.detach() if raw.requires_grad else raw

    # ---- the run ----

    def _layout(self, arguments: Mapping[str, Any]) -> Layout:
        self.layout = layout(self.adapter, unwrapped(self._denoiser()).config, arguments)
        return self.layout

    def _begin(self, call: Call) -> None:
        adapter = self.adapter
        call.check()
        self.doubled = adapter.order != "cond" and adapter.guided(self.pipe, self.arguments)
        self.paired = self.doubled and adapter.order == "two calls"
        time, evaluations = call.arguments[adapter.timestep], getattr(self.pipe, "_num_timesteps", None)
        self.course = Course(self.pipe.scheduler, adapter.clock(self.pipe), time, evaluations)
        self.rows, self.low = len(call.x), call.x.dtype in (torch.float16, torch.bfloat16)
        batch = self.rows
        self.half: slice | None = None  # the conditional rows of a call that holds both branches
        if self.doubled and not self.paired:
            batch = self.rows // 2
            self.half = slice(0, batch) if adapter.order.startswith("cond") else slice(batch, None)
        self.normed = self.doubled and adapter.normed(self.arguments)
        rule = NormMatched(self.guidance, axis=-1) if self.normed else self.guidance
        network = Network(self.course, adapter, raw=in_any_space(rule) and self.trace != "full")
        self.guided = Attached(network, self.models, type(unwrapped(call.module)), rule, batch, self.trace, self.seeds)
        own = self.pipe.__dict__
        self.scales = own.get("_guidance_scale"), own.get("_guidance_rescale")

    def _changed(self, call: Call) -> ValueError:
        """What a callback of the pipeline changed half-way."""
        scale = self.pipe.__dict__.get("_guidance_scale")
        if call.whole.shape[0] != self.rows and scale == self.scales[0]:
            return ValueError(
                f"the network was called with {len(call.whole)} rows after {self.rows}: a call from outside the pipeline's loop, "
                f"as by a callback, is not supported inside attach, nor is a callback that changes the batch"
            )
        return ValueError(
            f"a callback changed the guidance of the pipeline during the run (guidance scale {self.scales[0]} to {scale}); leave "
            f"it out, attach decides where guidance acts: write for example Interval({self.guidance!r}, 0, 0.5, 'fraction')"
        )

    def _output(self, call: Call, whole: Tensor) -> Any:
        """``whole`` in the form of the network's own output."""
        out: Any = list(whole.unbind()) if self.adapter.lists else whole
        if not call.arguments.get("return_dict", True):
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)

    def _missing(self, error: str) -> str:
        name = type(self.pipe).__name__
        if "'uncond'" not in error or self.doubled:
            return error
        if self.adapter.order == "cond" or (self.adapter.distilled(self.pipe) and self.adapter.order != "two calls"):
            return (
                f"{self.guidance!r} needs an unconditional branch, and {name} has no unconditional branch: its network is "
                f"distilled to be used without one. Use a guidance that needs none, or a model that is not distilled"
            )
        embedded = (
            " (the guidance scale embedded in this distilled network stays what it is)"
            if self.adapter.distilled(self.pipe)
            else ""
        )
        return (
            f"{self.guidance!r} needs an unconditional branch, and {name} was called with its own guidance off, so there is no "
            "unconditional branch (a distilled model, as Turbo, Lightning or LCM-LoRA, has no usable one): "
            f"pass {self.adapter.switch}; any value above 1 will do, its size has no effect{embedded}"
        )


def _tiny(dtype: torch.dtype) -> float:
    """Too small to matter, and its square still a number."""
    return 1e-4 if dtype == torch.float16 else 1e-18


def _pooled(control: nn.Module) -> bool:
    """Whether a ControlNet pools its residuals, for which the pipeline calls it in guess mode."""
    nets = getattr(control, "nets", None)
    first = nets[0] if isinstance(nets, nn.ModuleList) else control
    return bool(getattr(unwrapped(first).config, "global_pool_conditions", False))


def _replaced(module: nn.Module, answer: Answer) -> AbstractContextManager[None]:
    """Inside, a call of ``module`` goes to ``answer(original, args, kwargs)``; hooks and compilers around forward stay inside."""
    return replaced(module, "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl", answer)
