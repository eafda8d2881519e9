"""A pipeline's network as a denoiser: any rows of a call that the pipeline made, evaluated through its original forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from genkit import noise
from genkit.guidance.base import Perturbation
from genkit.pipelines.attach.adapters import Adapter
from genkit.pipelines.attach.course import Course, Place
from genkit.pipelines.attach.perturb import weaken

Batched = dict[str, Tensor]
CONTAINERS = (Tensor, dict, list, tuple)
EXTRA, CALL = "input", "call"  # keys of a condition beside the names of arguments


class Call:
    """One call of the network by the pipeline, taken apart.

    Attributes:
        module, forward: the network, and its original forward.
        arguments: by name, as they came.
        x: (rows, C, ...) the noisy images, in the dtype of the call.
        batched: (rows, ...) tensors by dotted name, with those of the ControlNet that feeds this call.
        lengths: own length (rows,) of each row of a tensor made from a list.
    """

    def __init__(
        self,
        adapter: Adapter,
        module: nn.Module,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        channels: int | None = None,
        control: Call | None = None,
    ) -> None:
        self.adapter, self.module, self.forward, self.arguments, self.control = adapter, module, forward, arguments, control
        self.batched: Batched = {}
        self.lengths: dict[str, list[int]] = {}
        whole = arguments[adapter.x]
        if adapter.lists:
            whole = torch.stack(whole)
        self.channels = channels or adapter.channels(unwrapped(module).config)
        self.x, channels = whole, self.channels
        if channels < whole.shape[adapter.axis]:
            self.x = whole.narrow(adapter.axis, 0, channels)
            self.batched[EXTRA] = whole.narrow(adapter.axis, channels, whole.shape[adapter.axis] - channels)
        for name, first, rest in adapter.paths:
            value = arguments.get(first)
            for key in rest:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, Tensor):
                self.batched[name] = value
            elif value is not None and name in adapter.lists:
                self.batched[name], self.lengths[name] = _padded(value)
            elif value is not None:
                self.batched.update(leaves(value, name))
        if control is not None:
            self.batched.update({f"control.{key}": value for key, value in control.batched.items()})

    def check(self) -> None:
        """Raise ValueError for a tensor of which the adapter does not say whether it has one row per sample."""
        known = (self.adapter.x, self.adapter.timestep, *self.adapter.batched, *self.adapter.shared)
        for name, value in self.arguments.items():
            for key, tensor in leaves(value, name):
                if tensor.ndim and not any(key == k or key.startswith(f"{k}.") for k in known):
                    raise ValueError(
                        f"the pipeline gives its network {key!r}, a tensor {tuple(tensor.shape)} that this adapter of "
                        f"genkit.attach does not know; leave out the option of the pipeline that adds it"
                    )
        for key, tensor in self.batched.items():
            if len(tensor) != len(self.x) and self.control is None:
                raise ValueError(f"{key!r} has {len(tensor)} rows, but the network's input has {len(self.x)}")

    def evaluate(self, forward: Callable[..., Any], x: Tensor, condition: Mapping[str, Tensor], time: float | None) -> Tensor:
        """Raw prediction (rows, C, ...) for rows of ``x`` with their condition; time None is the one of the call."""
        adapter, x = self.adapter, x.to(self.x.dtype)
        arguments = {
            name: filled(value, name, condition) if isinstance(value, CONTAINERS) else value
            for name, value in self.arguments.items()
        }
        if self.control is not None:
            arguments |= self.control.residuals(x, condition, time)
        extra = condition.get(EXTRA)
        whole = x if extra is None else torch.cat([x, extra], adapter.axis)
        arguments[adapter.timestep] = _time(self.arguments[adapter.timestep], len(x), time)
        arguments[adapter.x] = list(whole.unbind()) if adapter.lists else whole
        for name in adapter.lists:
            if name in condition:
                lengths = condition[f"{name}.length"].tolist()
                arguments[name] = [row[:n] for row, n in zip(condition[name], lengths, strict=True)]
        return self._prediction(forward(**arguments))

    def as_it_came(self) -> Tensor:
        """Raw prediction (rows, C, ...) of the call itself."""
        return self._prediction(self.forward(**self.arguments))

    def _prediction(self, out: Any) -> Tensor:
        raw: Tensor = out[0] if isinstance(out, tuple) else out.sample
        raw = torch.stack(list(raw)) if self.adapter.lists else raw
        axis = self.adapter.axis
        channels = self.x.shape[axis]
        return raw if raw.shape[axis] == channels else raw.narrow(axis, 0, channels)  # without a learned sigma

    def residuals(self, x: Tensor, condition: Mapping[str, Tensor], time: float | None) -> dict[str, Any]:
        """What this call of a ControlNet would have given to the network, for the rows of ``x``."""
        own = {key.removeprefix("control."): value for key, value in condition.items() if key.startswith("control.")}
        arguments = {name: filled(value, name, own) for name, value in self.arguments.items()}
        arguments[self.adapter.x] = x
        arguments[self.adapter.timestep] = _time(arguments[self.adapter.timestep], len(x), time)
        down, mid = self.forward(**{**arguments, "return_dict": False})
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class Network:
    """The denoiser ``network(x, sigma, condition) -> D`` over what the pipeline called last.

    A condition is a mapping of the call's batched arguments, by dotted name. ``calls`` counts the forward passes made.

    Args:
        raw: predictions stay in the space, and with the sign, of the network's output.
    """

    def __init__(self, course: Course, adapter: Adapter, raw: bool = False) -> None:
        self.course, self.adapter, self.raw, self.calls = course, adapter, raw, 0
        self.asked: float | None = None

    def at(self, place: Place, captured: tuple[Call, ...]) -> None:
        """Stand at an evaluation of the run."""
        self.place, self.level, self.captured = place, place.level, captured
        self.module, self.forward = captured[0].module, captured[0].forward

    def path(self, sigma: float) -> tuple[float, float]:
        """(alpha, s) of the network's input at a noise level: the scheduler's own values where it stands."""
        self.asked = sigma  # so that the call that follows need not read its levels back from the device
        return (self.place.alpha, self.place.s) if sigma == self.level else self.course.path(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        level, self.asked = float(sigma[0]) if self.asked is None else self.asked, None
        alpha, s = (self.place.alpha, self.place.s) if level == self.level else self.course.path(level)
        raw = self._rows(x, condition, None if level == self.level else self.course.time(level))
        return self._converted(raw, x, alpha, s)

    def both(self, x: Tensor) -> dict[str, Tensor]:
        """The conditional and the unconditional prediction at the ``x`` of the one call itself, which is made as it came."""
        self.calls += 1
        raw, batch = self.captured[0].as_it_came(), len(x)
        first, second = self.adapter.order.split()
        halves = {first: raw[:batch], second: raw[batch:]}
        return {name: self._converted(half, x, self.place.alpha, self.place.s) for name, half in halves.items()}

    def _converted(self, raw: Tensor, x: Tensor, alpha: float, s: float) -> Tensor:
        raw = raw.to(x.dtype)
        if self.raw:
            return raw
        return noise.to_x0(raw if self.adapter.sign == 1 else -raw, x, alpha, s, self.course.space)

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context the network is weakened. Raises ValueError if it cannot be, or lacks the layers."""
        module = self.module
        if unwrapped(module) is not module or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{type(unwrapped(module)).__name__} is compiled, which fixes its layers: it cannot be weakened")
        return weaken(module, perturbation, tuple(self.captured[0].x.shape))

    def _rows(self, x: Tensor, condition: Mapping[str, Tensor], time: float | None) -> Tensor:
        which = condition.get(CALL)
        if which is None:
            self.calls += 1
            return self.captured[0].evaluate(self.forward, x, condition, time)
        parts, numbers = list[Tensor](), which.tolist()
        for start, end in _blocks(numbers):  # each with the arguments, and in the size, of the pipeline's own call
            self.calls += 1
            call = self.captured[numbers[start]]
            own = {k: v[start:end] for k, v in condition.items() if k in call.batched}
            own = {k: v[:, : call.batched[k].shape[1]] if v.ndim > 1 else v for k, v in own.items()}
            parts.append(call.evaluate(self.forward, x[start:end], own, time))
        return torch.cat(parts)


class Other(Network):
    """Another network that is called as the pipeline's own is: the weak model of autoguidance."""

    def __init__(self, main: Network, module: nn.Module) -> None:
        super().__init__(main.course, main.adapter)
        self.main, self.other = main, module

    def path(self, sigma: float) -> tuple[float, float]:
        self.at(self.main.place, self.main.captured)
        self.module = self.forward = self.other
        return super().path(sigma)


def conditions(calls: tuple[Call, ...], order: str, batch: int) -> dict[str, dict[str, Tensor]]:
    """The condition of each branch: halves of one call, or a call each."""
    if len(calls) == 2:
        both = [{**call.batched, CALL: torch.full((batch,), i)} for i, call in enumerate(calls)]
        for key in both[0].keys() | both[1].keys():
            given = [c[key] for c in both if key in c]
            longest = max(v.shape[1] if v.ndim > 1 else 0 for v in given)
            for c in both:  # a mask may be left out of one call; what is added is never given to it
                c[key] = _lengthened(c.get(key, torch.zeros_like(given[0])), longest)
        return {"cond": both[0], "uncond": both[1]}
    call = calls[0]
    whole = {**call.batched, **{f"{key}.length": torch.tensor(value) for key, value in call.lengths.items()}}
    if len(call.x) == batch:
        return {"cond": whole}
    first, second = order.split()
    return {
        first: {key: value[:batch] for key, value in whole.items()},
        second: {key: value[batch:] for key, value in whole.items()},
    }


def leaves(value: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings and sequences, under its dotted name."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{key}.{i}")


def filled(value: Any, key: str, new: Mapping[str, Tensor]) -> Any:
    """``value`` with every tensor that ``new`` has under its dotted name replaced."""
    if isinstance(value, Tensor):
        return new.get(key, value)
    if isinstance(value, dict):
        return {name: filled(item, f"{key}.{name}", new) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(filled(item, f"{key}.{i}", new) for i, item in enumerate(value))
    return value


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``, all by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameters(type(unwrapped(module)).forward), args, strict=False)), **kwargs}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the module itself."""
    return module._modules.get("_orig_mod") or module


def _time(own: Any, rows: int, time: float | None) -> Any:
    """The call's time for another number of rows; at another level in the same form."""
    if not isinstance(own, Tensor):
        return own if time is None else time
    own = own[:1].expand(rows, *own.shape[1:]) if own.ndim else own
    if time is None:
        return own
    between = not own.is_floating_point() and time != int(time)
    return torch.full_like(own, time, dtype=torch.float32 if between else None)


def _padded(rows: list[Tensor]) -> tuple[Tensor, list[int]]:
    lengths = [len(row) for row in rows]
    return torch.stack([pad(row, (0, 0) * (row.ndim - 1) + (0, max(lengths) - len(row))) for row in rows]), lengths


def _lengthened(value: Tensor, length: int) -> Tensor:
    if value.ndim < 2 or value.shape[1] == length:
        return value
    return pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]))


def _blocks(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of equal numbers."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[start]:
            yield start, i
            start = i


__all__ = ["Call", "Network", "Other", "conditions", "leaves", "named", "unwrapped"]
