"""FlowAR's loop: scale by scale, a flow draws the latent that the transformer's features describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.denoiser import Condition, Guided, TraceLevel
from genkit.guidance.base import Branch, Guidance, StepInfo
from genkit.guidance.cfg import CFG
from genkit.guidance.interval import Interval
from genkit.guidance.scheduled import Scheduled
from genkit.models.flowar import time_grid
from genkit.models.flowar_velocity import FlowDenoiser
from genkit.noise import FLOW
from genkit.random import Gaussian, Noise
from genkit.samplers.autoregressive.cache import StaticCache
from genkit.samplers.diffusion.loop import Sampler, find_sampler, sample

Callback = Callable[[int, Tensor], None]
"""``callback(scale, latent)``: the latent (B, C, p, p) of each scale, as soon as it is drawn."""


class FlowARSettings(NamedTuple):
    """Steps for each scale, guidance scale at the last, and the time up to which there is guidance."""

    steps: int
    scale: float
    high: float


#: The settings of the paper's results.
FLOWAR_SETTINGS = {
    "S": FlowARSettings(25, 4.3, 0.9),
    "L": FlowARSettings(25, 2.4, 0.9),
    "H": FlowARSettings(50, 2.4, 0.7),
}


def flowar_guidance(scale: float, high: float = 1.0) -> Guidance:
    """FlowAR's guidance: ``w_k = 1 + (w - 1) k / (K - 1)`` at scale k of K, at times ``t <= high`` of its flow.

    Raises:
        ValueError: high is not above 0 and up to 1.
    """
    if not 0 < high <= 1:
        raise ValueError(f"high={high}: give a time above 0 and up to 1")
    ramp = Scheduled(CFG(scale), "linear", preserve_mean=False)
    return ramp if high == 1 else Interval(ramp, 0.0, high / (1 - high))


class _Lane:
    """The features of one network under one condition: its cache, the positions fed to it, the features of the present scale."""

    def __init__(self, cache: StaticCache) -> None:
        self.cache, self.filled = cache, 0
        self.features: Tensor | None = None


class GuidedFlow(Guided):
    """One run of a guidance over the flows of a FlowAR network. It guides velocities; a step's ``index`` counts scales.

    Features of the transformer are made for the branches that the guidance plans. A branch that is not planned costs nothing;
    when it is planned again, the scales it missed are fed first, in the same pass. The ledger counts the rows of both networks.

    Args:
        models: a :class:`genkit.models.flowar.FlowAR`, or several by name, of which ``"main"`` is required.
        guidance, conditions, batch, trace, seeds: as for :class:`genkit.denoiser.Guided`; conditions are labels (B,).
    """

    def __init__(
        self,
        models: Any,
        guidance: Guidance,
        conditions: Mapping[str, Condition],
        batch: int,
        trace: TraceLevel = "basic",
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.networks: dict[str, Any] = dict(models) if isinstance(models, Mapping) else {"main": models}
        super().__init__(
            {name: FlowDenoiser(network.flownet) for name, network in self.networks.items()},
            guidance,
            conditions,
            batch,
            trace,
            seeds,
        )
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._inputs: Tensor | None = None

    def begin(self, inputs: Tensor) -> None:
        """Go on to the next scale, whose inputs (B, p^2, C) these are. The guidance starts anew: its state is of one flow."""
        self._inputs = inputs if self._inputs is None else torch.cat((self._inputs, inputs), 1)
        self._width = inputs.shape[1]
        self.state = self.guidance.init(self.batch)
        self._packed.clear()
        for lane in self._lanes.values():
            lane.features = None

    def features(self, model: str, condition: str) -> Tensor:
        """The features (B, p^2, d) of the present scale.

        Raises:
            ValueError: no scale has begun.
            MissingCondition: the run has no condition of this name.
        """
        if self._inputs is None:
            raise ValueError("no scale has begun; call begin first")
        self.model(model)
        network, label = self.networks[model], self._condition(condition)
        key = (model, condition)
        if key not in self._lanes:
            self._lanes[key] = _Lane(StaticCache.of(network, self.batch))
        lane = self._lanes[key]
        if lane.features is None:
            found = network(self._inputs[:, lane.filled :], label, lane.cache, lane.filled)
            lane.filled = self._inputs.shape[1]
            lane.features = found[:, -self._width :]
            self.ledger.calls += 1
            self.ledger.count(1)
        return lane.features

    def _conditions(self, info: StepInfo, branches: tuple[Branch, ...]) -> list[Condition]:
        if any(b.transform for b in branches):
            raise ValueError(f"guidance={self.guidance!r} changes the condition during a flow, which FlowAR cannot: use CFG")
        return [self.features(b.model, b.condition) for b in branches]


@torch.no_grad()
def next_scale_flow(
    run: GuidedFlow,
    seeds: Sequence[int],
    *,
    steps: int = 25,
    sampler: str | Sampler = "flow_euler",
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw latents, scale by scale: ``x_k`` by the flow given z_k, z_k by the transformer from x_1, ..., x_{k-1}.

    Flows are integrated in float64.

    Args:
        run: a new one for every batch.
        seeds: one for each sample.
        steps: of every flow, see :func:`genkit.models.flowar.time_grid`.
        sampler: any of :data:`genkit.samplers.diffusion.SAMPLERS`; it integrates on the flow path.
        noise: source ``noise(like, scale)`` of the start of each flow; None draws it from the seeds.
        callback: see :data:`Callback`.

    Raises:
        ValueError: the guidance needs something that the sampler does not offer, or the seeds do not match the batch.

    Returns:
        (B, C, P, P).
    """
    network, solver = run.networks["main"], find_sampler(sampler)
    solver.check(run.guidance)
    if len(seeds) != run.batch:
        raise ValueError(f"seeds has {len(seeds)} entries for a batch of {run.batch}: give one for each sample")
    sides, channels = network.config.patch_nums, network.config.channels
    start, later = noise or Gaussian(seeds, stream=0), Gaussian(seeds, stream=1)
    t = time_grid(steps)
    sigmas, weight = t / (1 - t), network.z_proj.weight
    inputs = weight.new_zeros(run.batch, sides[0] ** 2, channels)
    for k, p in enumerate(sides):
        run.begin(inputs)
        like = torch.empty(run.batch, p * p, channels, dtype=torch.float64, device=weight.device)

        def guided(info: StepInfo, k: int = k) -> Any:
            return run(info._replace(index=k, total=len(sides), progress=k / max(len(sides) - 1, 1)))

        x = sample(guided, start(like, k), sigmas, solver, FLOW, later)
        if callback is not None:
            callback(k, x.mT.unflatten(-1, (p, p)))
        if k + 1 < len(sides):
            inputs = network.next_input(x.to(weight.dtype), k + 1)
    latent: Tensor = x.mT.unflatten(-1, (p, p)).to(weight.dtype)
    return latent
