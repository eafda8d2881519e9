"""The loop all diffusion samplers share, and the table of them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from genkit.guidance.base import Guidance, Need, Result, Stage, StepInfo, is_number
from genkit.guidance.expressions import build
from genkit.noise import Path
from genkit.random import Noise

Denoise = Callable[[StepInfo], Result]
StepFunction = Callable[..., tuple[Tensor, Any]]
Callback = Callable[[StepInfo, Result], None]
Route = Callable[[list["Point"], Path, Mapping[str, Any]], list["Point"]]


class Point(NamedTuple):
    """A noise level with its coordinates on the sampler's path."""

    sigma: float
    alpha: float
    s: float


class Step:
    """One step from ``here`` to ``there``: what a step function may know and do."""

    __slots__ = ("callback", "denoise_fn", "here", "index", "noise", "number", "path", "there", "total")

    def __init__(
        self,
        denoise: Denoise,
        path: Path,
        points: tuple[Point, Point],
        place: tuple[int, int],
        noise: Noise | None,
        number: int | None = None,
    ) -> None:
        self.denoise_fn, self.path, self.noise = denoise, path, noise
        self.here, self.there = points
        self.index, self.total = place
        self.number = self.index if number is None else number  # counts all steps, also those that come by an index again
        self.callback: Callback | None = None

    def denoise(self, x: Tensor, at: Point | None = None, stage: Stage = "step", keep_score: bool = False) -> Result:
        """The guided estimate at ``x``, on the level ``at`` (default: where the step begins).

        A score that comes with it is moved into the estimate, unless the solver keeps it to add it to a mean.
        """
        at = at or self.here
        progress = self.index / (self.total - 1) if self.total > 1 else 0.0
        info = StepInfo(self.index, self.total, progress, stage, self.here.sigma, self.there.sigma, at.alpha, at.s, x)
        result = self.denoise_fn(info)
        if result.score is not None and not keep_score:
            result = result.absorbed(info)
        if self.callback is not None and stage == "step":
            self.callback(info, result)
        return result

    def draw(self, like: Tensor) -> Tensor:
        """Unit noise for this step. Raises ValueError if the run has no noise source."""
        if self.noise is None:
            raise ValueError(
                "noise=None, but this sampler draws noise: give a noise source such as genkit.random.Gaussian(seeds, stream=1)"
            )
        return self.noise(like, self.number)


def direction(x: Tensor, result: Result, at: Point) -> Tensor:
    """``n_hat = (x - alpha D) / s``: the noise the estimate implies; a guidance may name another D for it (``direction``)."""
    d = result.denoised if result.direction is None else result.direction
    return (x - at.alpha * d) / at.s


@dataclass(frozen=True)
class Sampler:
    """A solver: ``step(step, x, memory, **options) -> (x, memory)``.

    Attributes:
        order: global order of convergence on a smooth probability flow (of the noise-free form).
        grid: name of the grid of noise levels it is best used with.
        path: coordinates it integrates in; None means those of the network.
        options: keyword arguments of the step function.
        offers: what it can give a guidance that asks for it: ``"direction"``, ``"corrector"``.
        route: ``route(points, path, options)``, the levels to visit in place of those of the grid. They may rise; the step
            function then gets a ``here`` below ``there``. Indices, and their total, remain those of the grid.
    """

    name: str
    step: StepFunction
    order: int
    grid: str = "karras"
    path: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    doc: str = ""
    offers: frozenset[Need] = frozenset()
    route: Route | None = None

    def __call__(self, *unnamed: Any, **options: Any) -> Sampler:
        """The sampler with other options, for example ``SAMPLERS["heun"](churn=40)``. Raises TypeError for one it lacks."""
        unknown = set(options) - set(self.options)
        has = ", ".join(self.options) or "none"
        if unnamed:
            raise TypeError(f"sampler {self.name!r}: name its options, as in heun(churn=40); its options: {has}")
        if unknown:
            raise TypeError(f"sampler {self.name!r} has no option {', '.join(sorted(unknown))!r}; its options: {has}")
        for key, value in options.items():
            if not is_number(value) or not (0 <= value <= sys.float_info.max or value == math.inf):
                raise ValueError(f"sampler {self.name!r}: {key}={value!r} must be a number from 0 on")
            if type(self.options[key]) is int and value % 1 != 0:  # a count
                raise ValueError(f"sampler {self.name!r}: {key}={value!r} must be a whole number")
        return replace(self, options={**self.options, **options})

    def check(self, guidance: Guidance) -> None:
        """Raise ValueError if the guidance needs something of a sampler that this one does not offer."""
        missing = (guidance.needs & OFFERED) - self.offers
        if missing:
            able = [name for name, other in SAMPLERS.items() if missing <= other.offers]
            raise ValueError(
                f"sampler={self.name!r} has no {' and no '.join(sorted(missing))}, which {guidance!r} needs; "
                f"use one of {', '.join(able)}"
            )

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})" if self.options else self.name


SAMPLERS: dict[str, Sampler] = {}
OFFERED: frozenset[Need] = frozenset({"direction", "corrector"})  # what depends on the sampler; the rest is up to the host


def register(
    name: str,
    *,
    order: int,
    grid: str = "karras",
    path: Path | None = None,
    offers: tuple[Need, ...] = (),
    route: Route | None = None,
    **options: Any,
) -> Callable[[StepFunction], StepFunction]:
    """Decorator: put a step function into the table under ``name``. An option whose default is an int is a count."""

    def add(step: StepFunction) -> StepFunction:
        doc = (step.__doc__ or "").strip().splitlines()[0]
        SAMPLERS[name] = Sampler(name, step, order, grid, path, options, doc, frozenset(offers), route)
        return step

    return add


def find_sampler(sampler: str | Sampler) -> Sampler:
    """A sampler by name or expression (``"heun"``, ``"heun(churn=40)"``). Raises ValueError with the known names."""
    if isinstance(sampler, Sampler):
        return sampler
    found = build(sampler, SAMPLERS, "sampler")
    if not isinstance(found, Sampler):
        raise ValueError(f"sampler={sampler!r} is not a sampler; use one of {', '.join(SAMPLERS)}")
    return found


def points(sigmas: Tensor, path: Path) -> list[Point]:
    """The grid on a path. Raises ValueError unless sigmas (N + 1,) fall strictly, the last one being >= 0."""
    values = [float(v) for v in sigmas.flatten()]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if sigmas.ndim != 1 or len(values) < 2 or not falling or not values[-1] >= 0:
        raise ValueError(
            f"sigmas={[round(v, 4) for v in values][:8]}: give at least two strictly falling noise levels, ending at 0 or above"
        )
    return [Point(v, *path(v)) for v in values]


def place(here: Point, grid: list[Point]) -> int:
    """The index of a step from ``here``: that of the last level of the grid at or above it, so that rounds are counted alike."""
    return max(sum(p.sigma >= here.sigma for p in grid[:-1]) - 1, 0)


def start(noise: Tensor, sigmas: Tensor, path: Path, image: Tensor | None = None) -> Tensor:
    """The first state: ``s n`` (plus ``alpha image``, for image-to-image) at the first noise level."""
    alpha, s = path(float(sigmas[0]))
    return s * noise if image is None else alpha * image + s * noise


def sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    sampler: str | Sampler,
    path: Path,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate from ``sigmas[0]`` to ``sigmas[-1]``.

    Args:
        denoise: maps a StepInfo to a Result: a :class:`genkit.denoiser.Guided`.
        x: the state at ``sigmas[0]`` (B, ...), in the coordinates of ``path`` (see :func:`start`).
        sigmas: (N + 1,) falling noise levels; see ``genkit.noise.GRIDS``.
        sampler: name, expression or object. Its own ``path``, if it has one, is not applied here: pass it.
        path: coordinates of ``x``.
        noise: source for samplers that add noise; not touched while their noise scale is 0.
        callback: called after the first evaluation of every step with its StepInfo and Result.

    Raises:
        ValueError: the guidance needs something that the sampler does not offer.

    Returns:
        The state at ``sigmas[-1]``; the image itself if that is 0. Differentiable.
    """
    solver = find_sampler(sampler)
    guidance = getattr(denoise, "guidance", None)
    if isinstance(guidance, Guidance):
        solver.check(guidance)
    grid = points(sigmas, path)
    way = grid if solver.route is None else solver.route(grid, path, solver.options)
    total, memory, options = len(grid) - 1, None, dict(solver.options)
    for i, (here, there) in enumerate(itertools.pairwise(way)):
        index = i if way is grid else place(here, grid)
        step = Step(denoise, path, (here, there), (index, total), noise, i)
        step.callback = callback
        x, memory = solver.step(step, x, memory, **options)
    return x


__all__ = ["SAMPLERS", "Point", "Sampler", "Step", "direction", "find_sampler", "points", "register", "sample", "start"]
