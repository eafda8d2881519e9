"""Restart sampling: go back up to a higher noise level with fresh noise, and down again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from genkit.noise import Path, karras
from genkit.samplers.diffusion.heun import heun
from genkit.samplers.diffusion.loop import Point, Sampler, Step, find_sampler, register


class Restart(NamedTuple):
    """``times`` restarts from ``low`` (the nearest level of the grid) to ``high``, each solved over ``points`` levels (>= 2)."""

    low: float
    high: float
    points: int = 3
    times: int = 1


def insert(grid: list[Point], path: Path, restarts: Sequence[Restart], rho: float = 7.0) -> list[Point]:
    """The grid with every restart in it: after ``low``, ``times`` times a rise to ``high`` and Karras levels down to ``low``.

    Raises:
        ValueError: fewer than two points, or a ``high`` that is not above the level nearest to ``low``.
    """
    at: dict[int, list[Point]] = {}
    for r in restarts:
        i = min((i for i, p in enumerate(grid) if p.sigma > 0), key=lambda i: abs(grid[i].sigma - r.low))
        low = grid[i]
        if r.points < 2 or not low.sigma < r.high < math.inf:
            raise ValueError(
                f"{r}: give at least 2 points, and a finite high above {low.sigma:.4g}, the grid's level nearest to low"
            )
        inner = [Point(v, *path(v)) for v in karras(int(r.points), low.sigma, r.high, rho)[:-2].tolist()]
        at.setdefault(i, []).extend([*inner, low] * int(r.times))
    return [point for i, here in enumerate(grid) for point in (here, *at.get(i, ()))]


def rise(step: Step, x: Tensor, scale: float = 1.0) -> Tensor:
    """Add the noise between two levels: ``x' / alpha' = x / alpha + scale sqrt(sigma'^2 - sigma^2) z``."""
    here, there = step.here, step.there
    up = scale * math.sqrt(there.sigma**2 - here.sigma**2)
    return (there.alpha / here.alpha) * x + (there.alpha * up) * step.draw(x)


def route(grid: list[Point], path: Path, options: Mapping[str, Any]) -> list[Point]:
    """The levels of the registered sampler."""
    return insert(grid, path, [Restart(*(options[key] for key in Restart._fields))])


@register(
    "restart", order=2, grid="edm", offers=("direction",), route=route, low=0.06, high=0.3, points=3, times=2, jump_noise=1.0
)
def restart(
    step: Step, x: Tensor, memory: Any, low: float, high: float, points: int, times: int, jump_noise: float
) -> tuple[Tensor, Any]:
    """Heun that goes ``times`` times from the level nearest ``low`` back to ``high`` (Xu et al. 2023).

    Fresh noise, scaled by ``jump_noise``, contracts the error of the steps before; each way down again has ``points`` Karras
    levels: 2 (points - 1) evaluations. A guidance begins anew after a rise, and sees the indices of the grid's levels again. For
    several intervals see :func:`restarted`.
    """
    if step.there.sigma > step.here.sigma:
        return rise(step, x, jump_noise), None
    return heun(step, x, memory, 0.0, 0.0, math.inf, 1.0)


def restarted(sampler: str | Sampler, restarts: Sequence[Restart], rho: float = 7.0, jump_noise: float = 1.0) -> Sampler:
    """Any sampler with restarts: ``restarted("dpmpp_2m", [Restart(0.05, 0.3, 3, 2), Restart(1.0, 5.0)])``.

    Args:
        sampler: name, expression or object, without a route of its own. A multistep method begins anew after a rise.
        restarts: intervals, points and numbers of rounds; see :class:`Restart`.
        rho: of the Karras levels inside an interval.
        jump_noise: factor on the noise of the rises.

    Raises:
        ValueError: the sampler has a route, or (when it is used) a restart does not fit the grid.
    """
    base = find_sampler(sampler)
    if base.route is not None:
        raise ValueError(f"sampler={base} chooses its levels itself; give one that follows the grid, such as 'heun'")

    def step_or_rise(step: Step, x: Tensor, memory: Any, **options: Any) -> tuple[Tensor, Any]:
        return (rise(step, x, jump_noise), None) if step.there.sigma > step.here.sigma else base.step(step, x, memory, **options)

    def visit(grid: list[Point], path: Path, options: Mapping[str, Any]) -> list[Point]:
        return insert(grid, path, restarts, rho)

    return replace(base, name=f"restarted {base.name}", step=step_or_rise, route=visit)


__all__ = ["Restart", "insert", "restart", "restarted", "rise"]
