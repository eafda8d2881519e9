"""Guidance whose unconditional branch is mostly estimated from what was seen before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from genkit import noise
from genkit.guidance import linear_ag_file
from genkit.guidance.base import (
    COND,
    UNCOND,
    Branch,
    Guidance,
    Predictions,
    Result,
    StepInfo,
    check_count,
    check_number,
    is_number,
)

Row = tuple[float, ...]
#: eps_u = eps_c + (eps_u - eps_c of the last evaluation): the estimate where nothing was fitted.
REUSE: Row = (1.0, -1.0, 1.0)


class History(NamedTuple):
    """Evaluations so far, newest first: without a gap, and no more of them than the longest row of coefficients reads."""

    step: int = -1  # of the newest evaluation
    second: bool = False  # whether that was a step's second one
    cond: tuple[Tensor, ...] = ()
    uncond: tuple[Tensor, ...] = ()  # evaluated or estimated


@dataclass(frozen=True)
class LinearAG(Guidance):
    """CFG in which ``eps_u(x_t)`` is mostly ``sum_{i>=t} b_i eps_c(x_i) + sum_{i>t} a_i eps_u(x_i)`` (Castillo et al. 2023).

    i runs over this and earlier evaluations, estimates among them. Without coefficients the last difference is used again,
    ``eps_u = eps_c + (eps_u - eps_c)_last``, and the unconditional branch is evaluated in every ``every``-th of the first
    ``until`` of the steps; with coefficients, where their row is empty. Coefficients belong to one sampler, number of steps,
    grid and scale (see :meth:`fit`); they do not depend on sample, pixel or channel.

    A step's second evaluation (Heun) is one more evaluation of the history: evaluated where the step is, with its own row
    else. Always evaluated: what has too little history (the first step, the first one behind a gap), correctors, and pure
    noise (alpha = 0), where eps is x / s for any estimate; the last two do not enter the history.

    Args:
        scale: w, 1 means no guidance.
        coefficients: () or one row per step: () to evaluate, else ``(b_t, b_{t+1}, .., b_{t+h}, a_{t+1}, .., a_{t+h})``,
            newest first, h >= 0 being the number of earlier evaluations it reads.
        second: rows of the steps' second evaluations; () for a sampler that has none.
        every: evaluate in the steps 0, every, 2 every, ... (1 or more); not used with coefficients.
        until: of the first ``ceil(until * steps)`` steps, a share from 0 to 1; step 0 is always evaluated. every=1 and
            until=1 is CFG.

    Raises:
        ValueError: an argument outside its range; in a run, coefficients for another number of steps or kind of sampler.
    """

    scale: float
    coefficients: tuple[Row, ...] = ()
    second: tuple[Row, ...] = ()
    every: int = 2
    until: float = 0.5
    space: ClassVar[noise.Space] = "eps"
    affine: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("LinearAG(3.0)", "LinearAG(3.0, every=3, until=1.0)")

    def __post_init__(self) -> None:
        check_number(self, "scale")
        check_number(self, "until", 0.0, 1.0)
        check_count(self, "every", 1)
        for name in ("coefficients", "second"):
            object.__setattr__(self, name, _rows(name, getattr(self, name)))
        if self.second and not self.coefficients:
            raise ValueError("LinearAG: second is given without coefficients; give both or none")

    def init(self, batch: int) -> History:
        return History()

    def row(self, info: StepInfo) -> Row:
        """Coefficients of this evaluation, () where the unconditional branch is evaluated."""
        if info.alpha == 0 or info.stage == "corrector":
            return ()
        if not self.coefficients:
            evaluated = info.index == 0 or (info.index % self.every == 0 and info.index < self.until * info.total)
            return () if evaluated else REUSE
        if len(self.coefficients) != info.total:
            raise ValueError(
                f"LinearAG: coefficients were fitted for {len(self.coefficients)} steps, but this run has {info.total}; "
                f"use steps={len(self.coefficients)}, fit them again, or leave coefficients=()"
            )
        rows = self.coefficients if info.stage == "step" else self.second
        if info.index >= len(rows):
            raise ValueError(
                "LinearAG: coefficients were fitted for a sampler with one evaluation a step, but this one has a second; "
                "use the sampler they were fitted for, or leave coefficients=()"
            )
        return rows[info.index]

    def plan(self, info: StepInfo, state: History) -> tuple[Branch, ...]:
        if self.weight(info) == 1:
            return (COND,)
        row = self.row(info)
        if self.second and info.stage == "step" and state.step == info.index - 1 >= 0 and not state.second:
            raise ValueError(
                "LinearAG: coefficients were fitted for a sampler with two evaluations a step, but this one has one; "
                "use the sampler they were fitted for, or leave coefficients=()"
            )
        return (COND,) if row and len(row) // 2 <= len(_recent(info, state).cond) else (COND, UNCOND)

    def combine(self, info: StepInfo, predictions: Predictions, state: History) -> tuple[Result, History]:
        w, cond = self.weight(info), predictions["cond"]
        if w == 1:
            return Result(cond), state
        if info.alpha == 0 or info.stage == "corrector":
            return Result(predictions["uncond"].lerp(cond, w)), state
        state, eps_c = _recent(info, state), noise.from_x0(cond, info.x, info.alpha, info.s, self.space)
        if "uncond" in predictions:
            eps_u = noise.from_x0(predictions["uncond"], info.x, info.alpha, info.s, self.space)
            result = Result(predictions["uncond"].lerp(cond, w))
        else:
            eps_u = estimate(self.row(info), (eps_c, *state.cond), state.uncond)
            result = self.guided(info, cond, eps_u)
        return result, self.recorded(info, state, eps_c, eps_u)

    def guided(self, info: StepInfo, cond: Tensor, eps_u: Tensor) -> Result:
        """CFG with an estimated unconditional prediction."""
        w = self.weight(info)
        uncond = noise.to_x0(eps_u, info.x, info.alpha, info.s, self.space)
        return Result(uncond.lerp(cond, w))

    @property
    def depth(self) -> int:
        """Number of earlier evaluations the longest row reads."""
        return max((len(row) // 2 for row in (*self.coefficients, *self.second)), default=1)

    def recorded(self, info: StepInfo, state: History, eps_c: Tensor, eps_u: Tensor) -> History:
        """The history with one more evaluation."""
        cond, uncond = (eps_c, *state.cond)[: self.depth], (eps_u, *state.uncond)[: self.depth]
        return History(info.index, info.stage == "second", cond, uncond)

    @classmethod
    def fit(
        cls,
        pipe: Callable[..., Any],
        classes: Any,
        seeds: Any,
        scale: float,
        *,
        sampler: Any = "heun",
        steps: int = 18,
        grid: Any = None,
        every: int = 2,
        until: float = 0.5,
        history: int = 2,
        follow: str = "own",
        ridge: float = 1e-9,
        digits: int = 6,
    ) -> LinearAG:
        """Coefficients by least squares in float64, evaluation by evaluation, in one run of ``pipe`` at the cost of CFG.

        Each row b minimises ``|eps_u - estimate|^2 / |eps_u|^2 + ridge |b - reuse|^2`` over all samples, pixels and channels,
        where ``reuse`` is the row that takes the last difference again. Later rows see the estimates it gives, rounded as
        they are kept: the history is that of a run with the fitted guidance.

        Args:
            pipe: called once, as ``pipe(classes, seeds, guidance, sampler=, steps=, grid=, trace="none")``; all samples in
                one batch. A few dozen are plenty: a row has 2 history + 1 numbers.
            scale: w, not 1.
            every, until: where the unconditional branch stays evaluated, as in the class.
            history: how many earlier evaluations a row reads, from 0 on. Short rows keep the expression short and generalise.
            follow: ``"own"``: samples move as the fitted guidance moves them, so a row is fitted where it will be used;
                ``"cfg"``: they move as CFG moves them (the paper's recorded trajectories).
            ridge: from 0, which is ordinary least squares. Neighbouring predictions are nearly parallel, so without it large
                coefficients of opposite sign appear that fit rounding errors; the default only keeps those away.
            digits: significant digits kept of each coefficient; 17 keeps all.

        Raises:
            ValueError: an argument outside its range, or a ``pipe`` that samples in several batches.
        """
        fitting = _Fitting(scale, every=every, until=until, history=history, follow=follow, ridge=ridge, digits=digits)
        pipe(classes, seeds, fitting, sampler=sampler, steps=steps, grid=grid, trace="none")
        return cls(scale, fitting.table(second=False), fitting.table(second=True))

    def save(self, path: Any, *, sampler: str, grid: str, **about: Any) -> None:
        """Add the coefficients to a JSON file, under their sampler, number of steps, scale and grid; an equal entry is replaced.

        Args:
            path: file to make or to add to.
            sampler, grid: what they were fitted for.
            about: further plain values to keep beside them (model, seeds, ...).

        Raises:
            ValueError: there are no coefficients, or the file is of another kind.
        """
        if not self.coefficients:
            raise ValueError("LinearAG: coefficients=() holds nothing to save; fit them with LinearAG.fit")
        key = {"sampler": sampler, "steps": len(self.coefficients), "scale": self.scale, "grid": grid}
        linear_ag_file.add(path, key, {"coefficients": self.coefficients, "second": self.second, "about": about})

    @classmethod
    def load(
        cls,
        path: Any,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        scale: float | None = None,
        grid: str | None = None,
    ) -> LinearAG:
        """The coefficients of a JSON file whose sampler, steps, scale and grid are as given; None is any.

        Raises:
            ValueError: no entry or several of them fit (they are listed), or the file is damaged or of another kind.
            FileNotFoundError: no such file.
        """
        entry = linear_ag_file.find(path, {"sampler": sampler, "steps": steps, "scale": scale, "grid": grid})
        made = cls(entry["scale"], entry["coefficients"], entry["second"])
        if len(made.coefficients) != entry["steps"]:
            raise ValueError(f"{path}: {len(made.coefficients)} rows of coefficients for {entry['steps']} steps; damaged")
        return made


@dataclass(frozen=True)
class _Fitting(LinearAG):
    """The run in which coefficients are fitted: evaluates both branches everywhere, and leaves the rows in ``rows``."""

    history: int = 2
    follow: str = "own"
    ridge: float = 1e-9
    digits: int = 6
    rows: dict[tuple[int, bool], Row] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == 1:
            raise ValueError("LinearAG.fit: scale=1 is no guidance, there is nothing to fit; use another scale")
        if self.follow not in ("own", "cfg"):
            raise ValueError(f"LinearAG.fit: follow={self.follow!r} must be 'own' or 'cfg'")
        check_number(self, "ridge", 0.0, math.inf)
        check_count(self, "history", 0)
        check_count(self, "digits", 1)

    def table(self, second: bool) -> tuple[Row, ...]:
        """The rows by step; () where a step evaluates nothing, as a rise of a restart."""
        last = max((index for index, half in self.rows if half == second), default=-1)
        return tuple(self.rows.get((i, second), ()) for i in range(last + 1))

    @property
    def depth(self) -> int:
        return self.history

    def plan(self, info: StepInfo, state: History) -> tuple[Branch, ...]:
        return COND, UNCOND

    def combine(self, info: StepInfo, predictions: Predictions, state: History) -> tuple[Result, History]:
        state = _recent(info, state)
        result, after = super().combine(info, predictions, state)
        if info.stage == "corrector":
            return result, after
        key, row = (info.index, info.stage == "second"), self.row(info)
        if key in self.rows:
            raise ValueError(
                "LinearAG.fit: pipe ran several batches, or came by a step twice; give it all samples in one, with "
                "batch_size=None, and a sampler without restarts"
            )
        if not row or (self.history and not state.cond):
            self.rows[key] = ()
            return result, after
        cond, real = predictions["cond"], noise.from_x0(predictions["uncond"], info.x, info.alpha, info.s, self.space)
        eps_c = noise.from_x0(cond, info.x, info.alpha, info.s, self.space)
        fitted = fit_row((eps_c, *state.cond), state.uncond, real, self.ridge)
        self.rows[key] = row = tuple(float(f"{b:.{self.digits}g}") for b in fitted)
        eps_u = estimate(row, (eps_c, *state.cond), state.uncond)
        return (self.guided(info, cond, eps_u) if self.follow == "own" else result), self.recorded(info, state, eps_c, eps_u)


def estimate(row: Row, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> Tensor:
    """``sum_i row_i cond_i + sum_j row_{h+1+j} uncond_j``: predictions newest first, those beyond the row not read."""
    h = len(row) // 2
    terms = [*cond[: h + 1], *uncond[:h]]
    out = row[0] * terms[0]
    for b, term in zip(row[1:], terms[1:], strict=True):
        out = torch.add(out, term, alpha=b)
    return out


def fit_row(cond: Sequence[Tensor], uncond: Sequence[Tensor], target: Tensor, ridge: float = 0.0) -> Row:
    """The row whose :func:`estimate` is nearest to ``target``, by least squares in float64.

    Args:
        cond, uncond: h + 1 and h predictions, newest first.
        target: what the unconditional branch really gave.
        ridge: weight of the squared distance to :data:`REUSE`, in units of ``|target|^2``; without it, of the rows that fit
            alike the nearest to REUSE.
    """
    h = len(uncond)
    reuse = torch.zeros(2 * h + 1, dtype=torch.float64)
    reuse[0] = 1.0
    if h:
        reuse[1], reuse[h + 1] = -1.0, 1.0
    columns = torch.stack([t.detach().double().flatten().cpu() for t in (*cond, *uncond)], dim=1)
    missing = target.detach().double().flatten().cpu() - columns @ reuse
    # gelsd: neighbouring predictions can be parallel, and of the changes that fit alike the smallest is wanted.
    if ridge:
        penalty = math.sqrt(ridge) * target.detach().double().norm().cpu()
        columns = torch.cat([columns, penalty * torch.eye(2 * h + 1, dtype=torch.float64)])
        missing = torch.cat([missing, torch.zeros_like(reuse)])
    change = torch.linalg.lstsq(columns, missing[:, None], driver="gelsd").solution[:, 0]
    return tuple((reuse + change).tolist())


def _recent(info: StepInfo, state: History) -> History:
    """The history if it reaches up to this evaluation, else none."""
    return state if info.index - state.step in (0, 1) else History()


def _rows(name: str, given: Any) -> tuple[Row, ...]:
    """Rows of coefficients as nested tuples of floats."""
    wanted = "a tuple of rows, each () or an odd number of finite numbers"
    if not isinstance(given, tuple | list) or not all(isinstance(row, tuple | list) for row in given):
        raise ValueError(f"LinearAG: {name}={str(given)[:60]!r} must be {wanted}")
    for i, row in enumerate(given):
        if (row and len(row) % 2 == 0) or not all(is_number(b) and abs(b) < 1e300 for b in row):
            raise ValueError(f"LinearAG: {name}[{i}]={str(row)[:60]} must be {wanted}")
    return tuple(tuple(float(b) for b in row) for row in given)
