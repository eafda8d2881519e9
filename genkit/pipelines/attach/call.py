"""One call of the network by the pipeline, which can be made again for any of its rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from genkit.pipelines.attach.adapters import Adapter

Batched = dict[str, Tensor]
CONTAINERS = (Tensor, dict, list, tuple)
EXTRA, FRAMES = "input", "frames"  # keys of a condition beside the names of arguments
FRAME = 2  # the axis of frames


class Layout(NamedTuple):
    """Which part of the network's input is the noisy image; the rest belongs to the condition.

    Attributes:
        axis: of the channels.
        channels: the image is the first of them.
        outputs: channels of the network's output, of which the image's are the first.
        frames: as many frames in front are clean, as the first one of a video that is made from an image.
        plain: input and output are tensors that hold nothing but the image.
    """

    axis: int
    channels: int
    outputs: int
    frames: int
    plain: bool

    def image(self, whole: Tensor) -> Tensor:
        """The noisy image within an input or an output."""
        if whole.shape[self.axis] != self.channels:
            whole = whole.narrow(self.axis, 0, self.channels)
        return whole.narrow(FRAME, self.frames, whole.shape[FRAME] - self.frames) if self.frames else whole

    def padded(self, raw: Tensor) -> Tensor:
        """A prediction for the image in the form of the network's output: zeros in what the pipeline does not read."""
        if self.axis == 1 and self.outputs > self.channels:
            raw = torch.cat([raw, raw.new_zeros(len(raw), self.outputs - self.channels, *raw.shape[2:])], 1)
        if self.frames:
            raw = torch.cat([raw.new_zeros(*raw.shape[:FRAME], self.frames, *raw.shape[FRAME + 1 :]), raw], FRAME)
        return raw


def layout(adapter: Adapter, config: Any, arguments: Mapping[str, Any]) -> Layout:
    """Read off the first call of a network with this config. Raises ValueError for noise that differs within the image."""
    whole, time = arguments[adapter.x], arguments[adapter.timestep]
    one, outputs = whole[0].unsqueeze(0) if adapter.lists else whole, adapter.channels(config)
    frames = 0
    if isinstance(time, Tensor) and time.ndim > 1:  # the time of every token, of those of a frame one after the other
        each = time[0].reshape(one.shape[FRAME], -1)
        frames = int((each == 0).all(1).long().cumprod(0).sum())
        if (each[frames:] != each[-1, -1]).any():
            raise ValueError(
                f"the pipeline tells its network different times for parts of one image ({adapter.timestep}): beside clean "
                f"frames in front, genkit.attach knows one noise level for each image"
            )
    frames, inputs = frames if frames < one.shape[FRAME] else 0, one.shape[adapter.axis]
    plain = outputs == inputs and not frames and not adapter.lists
    return Layout(adapter.axis, min(outputs, inputs), outputs, frames, plain)


class Call:
    """One call of the network by the pipeline.

    Attributes:
        module, forward: the network, and its original forward.
        arguments: by name, as they came.
        whole: (rows, C, ...) the network's input.
        x: (rows, C, ...) the noisy images in it.
        control: the call of the ControlNet that feeds this one.
    """

    def __init__(
        self,
        adapter: Adapter,
        module: nn.Module,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        layout: Layout,
        control: Call | None = None,
    ) -> None:
        self.adapter, self.module, self.forward, self.arguments = adapter, module, forward, arguments
        self.layout, self.control = layout, control
        whole = arguments[adapter.x]
        self.whole: Tensor = torch.stack(whole) if adapter.lists else whole
        self.x = self.whole if layout.plain else layout.image(self.whole)

    @cached_property
    def batched(self) -> Batched:
        """(rows, ...) tensors by dotted name, with those of the ControlNet.

        Of a tensor made from a list there is also the own length (rows,) of each row.
        """
        adapter, whole = self.adapter, self.whole
        found: Batched = {}
        axis, channels, _, frames, _ = self.layout
        if channels < whole.shape[axis]:
            found[EXTRA] = whole.narrow(axis, channels, whole.shape[axis] - channels)
        if frames:
            found[FRAMES] = whole.narrow(axis, 0, channels).narrow(FRAME, 0, frames)
        for name, first, rest in adapter.paths:
            value = self.arguments.get(first)
            for key in rest:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, Tensor):
                found[name] = value
            elif value is not None and name in adapter.lists:
                found[name], found[f"{name}.length"] = _padded(value)
            elif value is not None:
                found.update(leaves(value, name))
        if self.control is not None:
            found.update({f"control.{key}": value for key, value in self.control.batched.items()})
        return found

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
        adapter, x = self.adapter, x.to(self.whole.dtype)
        arguments = {
            name: filled(value, name, condition) if isinstance(value, CONTAINERS) else value
            for name, value in self.arguments.items()
        }
        if self.control is not None:
            arguments |= self.control.residuals(x, condition, time)
        frames, extra = condition.get(FRAMES), condition.get(EXTRA)
        whole = x if frames is None else torch.cat([frames, x], FRAME)
        whole = whole if extra is None else torch.cat([whole, extra], adapter.axis)
        arguments[adapter.timestep] = _time(self.arguments[adapter.timestep], len(x), time, self.layout.frames)
        arguments[adapter.x] = list(whole.unbind()) if adapter.lists else whole
        for name in adapter.lists:
            if name in condition:
                lengths = condition[f"{name}.length"].tolist()
                arguments[name] = [row[:n] for row, n in zip(condition[name], lengths, strict=True)]
        return self.prediction(forward(**arguments))

    def residuals(self, x: Tensor, condition: Mapping[str, Tensor], time: float | None) -> dict[str, Any]:
        """What this call of a ControlNet would have given to the network, for the rows of ``x``."""
        own = {key.removeprefix("control."): value for key, value in condition.items() if key.startswith("control.")}
        arguments = {name: filled(value, name, own) for name, value in self.arguments.items()}
        arguments[self.adapter.x] = x
        arguments[self.adapter.timestep] = _time(arguments[self.adapter.timestep], len(x), time)
        down, mid = self.forward(**{**arguments, "return_dict": False})
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def prediction(self, out: Any) -> Tensor:
        """The raw prediction (rows, C, ...) in an output of the network."""
        raw: Tensor = out[0] if isinstance(out, tuple) else out.sample
        return self.layout.image(torch.stack(list(raw)) if self.adapter.lists else raw)


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


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a call of ``module``, in their order."""
    return tuple(inspect.signature(type(unwrapped(module)).forward).parameters)[1:]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the module itself."""
    return module._modules.get("_orig_mod") or module


def _time(own: Any, rows: int, time: float | None, clean: int = 0) -> Any:
    """The call's time for another number of rows; at another level in the same form, 0 in what is clean."""
    if not isinstance(own, Tensor):
        return own if time is None else time
    own = own[:1].expand(rows, *own.shape[1:]) if own.ndim else own
    if time is None:
        return own
    between = not own.is_floating_point() and time != int(time)
    new = torch.full_like(own, time, dtype=torch.float32 if between else None)
    return new.masked_fill(own == 0, 0) if clean else new


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = [len(row) for row in rows]
    same = [pad(row, (0, 0) * (row.ndim - 1) + (0, max(lengths) - len(row))) for row in rows]
    return torch.stack(same), torch.tensor(lengths)


__all__ = ["Call", "Layout", "layout", "leaves", "parameters", "unwrapped"]
