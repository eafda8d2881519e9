"""The run of a guidance over a pipeline's calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from genkit.denoiser import Condition, Guided, TraceLevel
from genkit.guidance.base import COND, UNCOND, Branch, Guidance, StepInfo
from genkit.pipelines.attach.call import Call
from genkit.pipelines.attach.network import Network, conditions
from genkit.pipelines.course import Place

BOTH = (COND, UNCOND)


class Attached(Guided):
    """A run that is told before every evaluation, by :meth:`at`, where the pipeline stands and what it called.

    Args:
        network: the pipeline's own.
        models: further models by name; modules of ``kind`` are called as the pipeline's network is.
        guidance, batch, trace, seeds: as for :class:`genkit.denoiser.Guided`.
    """

    def __init__(
        self,
        network: Network,
        models: Mapping[str, Any],
        kind: type[nn.Module],
        guidance: Guidance,
        batch: int,
        trace: TraceLevel,
        seeds: Sequence[int] | None,
    ) -> None:
        others = {
            name: Network(network.course, network.adapter, module=model) if isinstance(model, kind) else model
            for name, model in models.items()
        }
        super().__init__({"main": network, **others}, guidance, {}, batch, trace, seeds)
        self.network = network
        self._networks = [net for net in self.models.values() if isinstance(net, Network)]
        self._seen: list[tuple[Tensor, int]] = []

    def at(self, place: Place, calls: tuple[Call, ...], whole: bool = False) -> None:
        """Stand at an evaluation of the run, for the next ``run(info)``.

        Args:
            place: where the scheduler stands.
            calls: the pipeline's call, or its two calls.
            whole: the one call holds both branches, and may be made as it came where they are all that is planned, which saves
                taking it apart and packing it again.
        """
        for net in self._networks:
            net.place, net.captured = place, calls
        # A network may take keys out of its arguments: what comes as it came is then no longer there for what follows.
        self._whole = whole and not (self._prepares or self._refines)
        if not self._whole:
            self._take_conditions()

    def evaluate(self, info: StepInfo, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        if not self._whole:
            return super().evaluate(info, branches)
        if branches != BOTH:
            self._take_conditions()
            return super().evaluate(info, branches)
        self._asked += branches
        self.ledger.count(2)
        self.ledger.calls += 1
        return self.network.both(info.x)

    def _take_conditions(self) -> None:
        """Give the run the calls' conditions, anew only if they changed: it keeps them packed."""
        calls = self.network.captured
        now = [(t, 0 if t.is_inference() else t._version) for call in calls for t in call.batched.values()]
        seen = self._seen  # holds the tensors, so that none of them is another one in the same place
        same = bool(seen) and len(now) == len(seen)
        if not same or any(a is not b or v != w for (a, v), (b, w) in zip(now, seen, strict=True)):
            self.condition_on(conditions(calls, self.network.adapter.order, self.batch))
            self._seen = now

    def _pass(self, net: Any, x: Tensor, sigma: float, condition: Condition) -> Tensor:
        return net.at_level(x, sigma, condition) if isinstance(net, Network) else super()._pass(net, x, sigma, condition)


__all__ = ["Attached"]
