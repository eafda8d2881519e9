"""A pipeline's network as a denoiser: any rows of a call that the pipeline made, evaluated through its original forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from genkit import noise
from genkit.guidance.base import Perturbation
from genkit.pipelines.attach.adapters import Adapter
from genkit.pipelines.attach.call import Call, unwrapped
from genkit.pipelines.attach.perturb import weaken
from genkit.pipelines.course import Course, Place

CALL = "call"  # key of a condition: by which of two calls a row is evaluated


class Network:
    """The denoiser ``network(x, sigma, condition) -> D`` over what the pipeline ``captured`` last, at its ``place`` in the run.

    A condition is a mapping of the call's batched arguments, by dotted name. ``calls`` counts the forward passes made.

    Args:
        raw: predictions stay in the space, and with the sign, of the network's output.
        module: another network to call as the pipeline calls its own: the weak model of autoguidance.
    """

    def __init__(self, course: Course, adapter: Adapter, raw: bool = False, module: nn.Module | None = None) -> None:
        self.course, self.adapter, self.raw, self.other, self.calls = course, adapter, raw, module, 0
        self.place, self.captured = cast(Place, None), tuple[Call, ...]()
        self.halves = adapter.order.split()  # of a call that holds both branches

    def path(self, sigma: float) -> tuple[float, float]:
        """(alpha, s) of the network's input at a noise level: the scheduler's own values where it stands."""
        return (self.place.alpha, self.place.s) if sigma == self.place.level else self.course.path(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.at_level(x, float(sigma[0]), condition)

    def at_level(self, x: Tensor, sigma: float, condition: Mapping[str, Tensor]) -> Tensor:
        """``network(x, sigma, condition)`` with its one noise level as a number, which need not be read back from the device."""
        raw = self._rows(x, condition, None if sigma == self.place.level else self.course.time(sigma))
        return self._converted(raw, x, *self.path(sigma))

    def both(self, x: Tensor) -> dict[str, Tensor]:
        """The conditional and the unconditional prediction at the ``x`` of the one call itself, which is made as it came."""
        self.calls += 1
        call, (one, two), batch = self.captured[0], self.halves, x.shape[0]
        out = call.forward(**call.arguments)
        raw = out[0] if call.layout.plain and type(out) is tuple else call.prediction(out)
        first, second = raw[:batch], raw[batch:]
        if self.raw and raw.dtype == x.dtype:
            return {one: first, two: second}
        alpha, s = self.place.alpha, self.place.s
        return {one: self._converted(first, x, alpha, s), two: self._converted(second, x, alpha, s)}

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context the network is weakened. Raises ValueError if it cannot be, or lacks the layers."""
        module = self.other or self.captured[0].module
        if unwrapped(module) is not module or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{type(unwrapped(module)).__name__} is compiled, which fixes its layers: it cannot be weakened")
        return weaken(module, perturbation, tuple(self.captured[0].x.shape))

    def _converted(self, raw: Tensor, x: Tensor, alpha: float, s: float) -> Tensor:
        raw = raw.to(x.dtype)
        if self.raw:
            return raw
        return noise.to_x0(raw if self.adapter.sign == 1 else -raw, x, alpha, s, self.course.space)

    def _rows(self, x: Tensor, condition: Mapping[str, Tensor], time: float | None) -> Tensor:
        forward = self.other or self.captured[0].forward
        which = condition.get(CALL)
        if which is None:
            self.calls += 1
            return self.captured[0].evaluate(forward, x, condition, time)
        parts, numbers = list[Tensor](), which.tolist()
        for start, end in _blocks(numbers):  # each with the arguments, and in the size, of the pipeline's own call
            self.calls += 1
            call = self.captured[numbers[start]]
            own = {k: v[start:end] for k, v in condition.items() if k in call.batched}
            own = {k: v[:, : call.batched[k].shape[1]] if v.ndim > 1 else v for k, v in own.items()}
            parts.append(call.evaluate(forward, x[start:end], own, time))
        return torch.cat(parts)


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
    if len(call.x) == batch:
        return {"cond": call.batched}
    first, second = order.split()
    return {
        first: {key: value[:batch] for key, value in call.batched.items()},
        second: {key: value[batch:] for key, value in call.batched.items()},
    }


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


__all__ = ["Network", "conditions"]
