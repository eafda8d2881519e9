"""The table of metrics: one ``Spec`` each, used alike by the command, the report and the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.sample import Pair


@dataclass(frozen=True)
class Spec:
    """What a metric is called, which protocol it follows, and how it is computed.

    ``title`` may hold ``{extractor}``. ``variant`` names the protocol, so that numbers of two protocols never share a name.
    ``value(pair)`` is the number; ``replicates(pair, counts)`` is (B,) numbers, one for each resample, and equals ``value``
    when every image is counted once. ``ideal`` is the value for two identical sets, None where there is none.
    ``interval_of`` says in words what the bootstrap resamples. ``over_moments``: the reference enters by its stored mean and
    covariance alone, so the count that belongs to the number is that of the images behind them.
    """

    name: str
    title: str
    variant: str
    better: Literal["lower", "higher", "neither"]
    source: Literal["features", "pixels"]
    value: Callable[[Pair], float]
    replicates: Callable[[Pair, Counts], Tensor]
    interval_of: str
    ideal: float | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    over_moments: bool = False


METRICS: dict[str, Spec] = {}


def register(spec: Spec) -> Spec:
    """Add a metric to the table; ValueError when the name is taken by another protocol."""
    known = METRICS.get(spec.name)
    if known is not None and known.variant != spec.variant:
        raise ValueError(
            f"metric {spec.name!r} is already registered as {known.variant!r}; choose another name than for {spec.variant!r}"
        )
    METRICS[spec.name] = spec
    return spec
