"""One call of a pipeline under a guidance: its network's forward taken over, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit import noise
from genkit.denoiser import Guided, MissingCondition, TraceLevel
from genkit.guidance.base import COND, UNCOND, Branch, Guidance, StepInfo
from genkit.guidance.norm_matched import NormMatched
from genkit.pipelines.attach.adapters import Adapter, Arguments
from genkit.pipelines.attach.course import Course
from genkit.pipelines.attach.network import Call, Network, Other, conditions, named, unwrapped
from genkit.pipelines.raw import in_any_space


class Deferred:
    """Stands for the residuals of a ControlNet, which is evaluated with the network, for the rows that are then asked for."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Attached(Guided):
    """A run whose network can be called as the pipeline called it, which saves taking the call apart and packing it again."""

    #: The point at which the calls may be made as they came, if they hold both branches.
    x: Tensor | None = None

    def evaluate(self, info: StepInfo, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        if self.x is None or info.x is not self.x or branches != (COND, UNCOND):
            return super().evaluate(info, branches)
        self._asked += branches
        self.ledger.count(2)
        self.ledger.calls += 1
        made: dict[str, Tensor] = self.models["main"].both(info.x)
        return made


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
        self.seen: list[tuple[Tensor, int]] = []
        self.evaluating = False
        self.channels: int | None = None  # of the noisy image, once it is known

    # ---- taking over ----

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the pipeline's networks answer with guided predictions. They are put back however it ends."""
        with ExitStack() as stack:
            for name in self.adapter.denoisers:
                module = getattr(self.pipe, name, None)
                if module is not None:
                    self._check(name, module)
                    stack.enter_context(_replaced(module, functools.partial(self._denoise, module)))
            control = getattr(self.pipe, self.adapter.control) if self.adapter.control else None
            if control is not None and not self.arguments.get("guess_mode") and not _pooled(control):
                stack.enter_context(_replaced(control, functools.partial(self._defer, control)))
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
        if self.adapter.eval_only and module.training:
            raise ValueError(f"pipe.{name} is in training mode, where it drops labels at random: call pipe.{name}.eval()")
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

    def _defer(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        channels = self.adapter.channels(unwrapped(self._denoiser()).config)
        call = Call(self.adapter, module, forward, named(module, args, kwargs), channels)
        return Deferred(call), Deferred(call)

    def _denoise(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.evaluating:  # the guidance itself calls the network, as a model of another name
            return forward(*args, **kwargs)
        arguments = named(module, args, kwargs)
        residual = arguments.get("mid_block_additional_residual")
        control = residual.call if isinstance(residual, Deferred) else None
        call = Call(self.adapter, module, forward, arguments, self.channels, control)
        self.channels = call.channels
        if self.guided is None:
            self._begin(call)
        self._watch(call)
        place = self.course.place(arguments[self.adapter.timestep])
        calls: tuple[Call, ...] = (call,)
        if self.doubled and self.adapter.order == "two calls":
            if self.held is None:
                self.held = call, torch.empty_like(call.x)
                return self._answer(call, self.held[1])
            first, answer = self.held
            self.held, calls = None, (first, call)
        assert self.guided is not None
        self.network.at(place, calls)
        self._condition(calls)
        x = self._half(calls[0].x)
        info = place.info(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        # Not two calls: a pipeline may have changed the first one's containers by the time of the second.
        self.guided.x = info.x if self.doubled and control is None and len(calls) == 1 else None
        self.evaluating = True
        try:
            result = self.guided(info).absorbed(info)
        except MissingCondition as error:
            raise ValueError(self._missing(str(error))) from error
        finally:
            self.evaluating = False
        raw = result.denoised.detach()
        if not self.network.raw:
            raw = noise.from_x0(raw, info.x, info.alpha, info.s, self.course.space)
            raw = raw if self.adapter.sign == 1 else -raw
        raw = raw.to(x.dtype)
        if self.normed:  # the pipeline divides by the norm of each token
            raw = torch.where(raw.abs().amax(-1, keepdim=True) > 0, raw, _tiny(raw.dtype))
        if len(calls) == 2:
            answer.copy_(raw)
            return self._answer(call, raw)
        return self._answer(call, torch.cat([raw, raw]) if self.doubled else raw)

    # ---- the run ----

    def _begin(self, call: Call) -> None:
        adapter = self.adapter
        call.check()
        self.doubled = adapter.order != "cond" and adapter.guided(self.pipe, self.arguments)
        time, evaluations = call.arguments[adapter.timestep], getattr(self.pipe, "_num_timesteps", None)
        self.course = Course(self.pipe.scheduler, adapter.clock(self.pipe), time, evaluations)
        self.rows = len(call.x)
        self.batch = self.rows // 2 if self.doubled and adapter.order != "two calls" else self.rows
        self.normed = self.doubled and adapter.normed(self.arguments)
        rule = NormMatched(self.guidance, axis=-1) if self.normed else self.guidance
        self.network = Network(self.course, adapter, raw=in_any_space(rule) and self.trace != "full")
        kind = type(unwrapped(call.module))
        others = {k: Other(self.network, m) if isinstance(m, kind) else m for k, m in self.models.items()}
        self.guided = Attached({"main": self.network, **others}, rule, {}, self.batch, self.trace, self.seeds)
        self.scales = self._scales()

    def _watch(self, call: Call) -> None:
        """Refuse what a callback of the pipeline changed half-way."""
        if call.x.shape[0] != self.rows and self._scales() == self.scales:
            raise ValueError(
                f"the network was called with {len(call.x)} rows after {self.rows}: a call from outside the pipeline's loop, as "
                f"by a callback, is not supported inside attach, nor is a callback that changes the batch"
            )
        if self._scales() != self.scales:
            raise ValueError(
                f"a callback changed the guidance of the pipeline during the run (guidance scale {self.scales[0]} to "
                f"{self._scales()[0]}); leave it out, attach decides where guidance acts: "
                f"write for example Interval({self.guidance!r}, 0, 0.5, 'fraction')"
            )
        if call.arguments.get("skip_layers") is not None:
            raise ValueError("skip_layers: the pipeline's own layer skipping is not compatible with attach")

    def _scales(self) -> tuple[Any, ...]:
        own = self.pipe.__dict__
        return own.get("_guidance_scale"), own.get("_guidance_rescale")

    def _half(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == self.batch:
            return rows
        return rows[: self.batch] if self.adapter.order.startswith("cond") else rows[self.batch :]

    def _condition(self, calls: tuple[Call, ...]) -> None:
        """Give the run the calls' conditions, anew only if they changed: it keeps them packed."""
        now = [(t, 0 if t.is_inference() else t._version) for call in calls for t in call.batched.values()]
        if (
            not self.seen
            or len(now) != len(self.seen)
            or any(a is not b or v != w for (a, v), (b, w) in zip(now, self.seen, strict=True))
        ):
            assert self.guided is not None
            self.guided.condition_on(conditions(calls, self.adapter.order, self.batch))
            self.seen = now

    def _answer(self, call: Call, raw: Tensor) -> Any:
        """``raw`` in the form of the network's own output."""
        out: Any = raw
        if self.adapter.lists:
            out = list(raw.unbind())
        elif self.adapter.axis == 1 and call.channels > raw.shape[1]:  # a learned sigma, which the pipeline drops
            out = torch.cat([raw, raw.new_zeros(len(raw), call.channels - raw.shape[1], *raw.shape[2:])], 1)
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


@contextmanager
def _replaced(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of ``module`` goes to ``answer(original, args, kwargs)``; hooks and compilers around forward stay inside."""
    name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
    own, original = name in module.__dict__, getattr(module, name)

    @functools.wraps(original)
    def mine(*args: Any, **kwargs: Any) -> Any:
        return answer(original, args, kwargs)

    setattr(module, name, mine)
    try:
        yield
    finally:
        if module.__dict__.get(name) is mine:  # offloading may have put its own hooks back in the meantime
            if own:
                setattr(module, name, original)
            else:
                delattr(module, name)
