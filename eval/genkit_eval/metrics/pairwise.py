"""The tiled engine for nearest-neighbour metrics: exact answers from float32 products, with memory that does not grow with N x N.

A tile is one product of centred float32 rows. Its error has a proven bound; whatever lies within it of a limit is computed
again: the tile in float64 where that is much, then single pairs by direct differences in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of one tile: 16 MiB in float32, and the operands of its product as much again at 2048 columns.
STEP = 2048
# Pairs that one tile may leave to direct differences before it is taken in float64: about what the product in float64 costs.
MANY = 2**14
# Candidates kept beside the k nearest, for those whose order float32 cannot tell.
SPARE = 5


def steps(n: int, step: int | None = None) -> list[slice]:
    """Consecutive slices of at most ``step`` (default ``STEP``) that make up 0..n."""
    step = step or STEP
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def direct_squared(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``|x_i - y_j|^2`` (P,) float64 of listed pairs, by differences: equal distances come out as equal numbers."""
    found = torch.empty(len(i), dtype=torch.float64)
    for part in steps(len(i), max(1, 2**17 // x.shape[1])):  # what a cache holds
        gap = x.index_select(0, i[part]).double().sub_(y.index_select(0, j[part]))
        found[part] = gap.square_().sum(dim=1)
    return found


class Distances:
    """Squared distances between the rows of ``x`` (N, D) and ``y`` (M, D), a tile at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        # Distances do not change, rounding shrinks; float32 exactly, so that float32 features minus it round once.
        self.centre = (sum(part.double().sum(dim=0) for part in y.split(256)) / len(y)).float().to(y.dtype)
        # Products that are allowed to round their factors (TF32, bfloat16) have no such bound.
        self.dtype = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
        self.xn = self._norms(x)
        self.yn = self.xn if y is x else self._norms(y)

    def _norms(self, x: Tensor) -> Tensor:
        """Squared lengths (N,) of the centred rows, float64 sums of squares that are rounded as those of a tile are."""
        found = torch.empty(len(x), dtype=torch.float64)
        for part in steps(len(x)):
            found[part] = self._centred(x[part], self.dtype).square_().sum(dim=1, dtype=torch.float64)
        return found

    def _centred(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(part.dtype, dtype)
        centred: Tensor = part.to(wide) - self.centre.to(wide)
        return centred.to(dtype)

    def tile(self, rows: slice | Tensor, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Squared distances (rows, columns), right to within ``relative_error`` of the sum of both squared lengths."""
        dtype = dtype or self.dtype
        x, y = self._centred(self.x[rows], dtype), self._centred(self.y[columns], dtype)
        known = dtype == self.dtype
        xn, yn = (self.xn[rows], self.yn[columns]) if known else (x.square().sum(dim=1), y.square().sum(dim=1))
        products: Tensor = torch.addmm(yn.to(dtype), x, y.T, alpha=-2)
        return products.add_(xn[:, None].to(dtype))

    def relative_error(self, dtype: torch.dtype | None = None) -> float:
        """Bound of the rounding: D products summed in any order (Higham 2002, eq. 3.5), the centring and a few sums."""
        return (self.x.shape[1] + 16) * torch.finfo(dtype or self.dtype).eps / 2


class Close(NamedTuple):
    """Pairs of a tile with a limit they may be under: ``inside`` (P, K) for the K limits of the row or column."""

    axis: str
    i: Tensor
    j: Tensor
    inside: Tensor


def within(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, strict: bool = False) -> Iterator[Close]:
    """All pairs with ``|x_i - y_j|^2 <= limit`` (``<`` where ``strict``), tile by tile, exact also where distances are equal.

    ``rows`` (N, K) and ``columns`` (M, L) are squared limits. Each tile gives the pairs under the largest limit of their row and
    then those under that of their column; ``inside`` tells which limits they are under.
    """
    distances = Distances(x, y)
    for r in steps(len(x)):
        for c in steps(len(y)):
            tile = distances.tile(r, c)
            for axis, limits in (("rows", rows[r]), ("columns", columns[c])):
                if limits.shape[1]:
                    yield _close(distances, tile, (r, c), axis, limits, strict)


def _close(distances: Distances, tile: Tensor, at: tuple[slice, slice], axis: str, limits: Tensor, strict: bool) -> Close:
    (r, c), along = at, axis == "rows"
    own, other = (distances.xn[r], distances.yn[c]) if along else (distances.yn[c], distances.xn[r])
    largest = limits.amax(dim=1)
    for dtype in dict.fromkeys((tile.dtype, torch.float64)):
        if dtype != tile.dtype:
            tile = distances.tile(r, c, dtype)
        slack = distances.relative_error(dtype) * (own + other.max() + largest)
        most = (largest + slack).to(dtype)
        i, j = (tile <= (most[:, None] if along else most[None, :])).nonzero(as_tuple=True)
        mine = i if along else j
        found, edges = tile[i, j].double()[:, None], limits[mine]
        unsure = ((found - edges).abs() <= slack[mine, None]).any(dim=1).nonzero().flatten()
        if len(unsure) <= MANY:
            break
    found[unsure, 0] = direct_squared(distances.x[r], distances.y[c], i[unsure], j[unsure])
    return Close(axis, i + r.start, j + c.start, found < edges if strict else found <= edges)


def nearest(x: Tensor, y: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """Squared distances (N, k) from each row of ``x`` to its k nearest rows of ``y``, ascending, and their indices.

    Without ``y``: to its k nearest other rows of ``x``. ValueError unless 1 <= k <= rows to choose from.
    """
    own, y = y is None, x if y is None else y
    choice = len(y) - own
    if not 1 <= k <= choice:
        raise ValueError(f"k: got {k} for {len(y)} images; 1 to {choice} works")
    distances, keep = Distances(x, y), min(choice, k + SPARE)
    values = torch.full((len(x), keep), torch.inf, dtype=distances.dtype)
    indices = torch.zeros(len(x), keep, dtype=torch.int64)

    def add(rows: slice, columns: slice, tile: Tensor) -> None:
        some, at = tile.topk(min(keep, tile.shape[1]), dim=1, largest=False, sorted=False)
        both = torch.cat([values[rows], some], dim=1)
        values[rows], order = both.topk(keep, dim=1, largest=False)
        indices[rows] = torch.cat([indices[rows], at + columns.start], dim=1).gather(1, order)

    for r in steps(len(x)):
        for c in steps(len(y)):
            if own and c.start < r.start:
                continue
            tile = distances.tile(r, c)
            if own and c == r:
                tile.fill_diagonal_(torch.inf)
            add(r, c, tile)
            if own and c != r:
                add(c, r, tile.T.contiguous())
    return _settled(distances, values.double(), indices, k, own)


def _settled(distances: Distances, values: Tensor, indices: Tensor, k: int, own: bool) -> tuple[Tensor, Tensor]:
    """The exact k nearest among the candidates; rows that may have others are looked through again."""
    keep, choice = values.shape[1], len(distances.y) - own
    slack = distances.relative_error() * (distances.xn + distances.yn.max() + values[:, k - 1])
    edge = values[:, k - 1] + 2 * slack
    i, s = (values <= edge[:, None]).nonzero(as_tuple=True)
    exact = torch.full_like(values, torch.inf)
    exact[i, s] = direct_squared(distances.x, distances.y, i, indices[i, s])
    found, order = exact.topk(k, dim=1, largest=False)
    chosen = indices.gather(1, order)
    # Nothing is nearer than 0: many copies of one image need no second look.
    short = ((values[:, -1] <= edge) & (found[:, -1] > 0)).nonzero().flatten() if keep < choice else torch.zeros(0).long()
    for part in steps(len(short), max(1, STEP * STEP // (2 * len(distances.y)))):
        found[short[part]], chosen[short[part]] = _searched(distances, short[part], k, own)
    return found, chosen


def _searched(distances: Distances, rows: Tensor, k: int, own: bool) -> tuple[Tensor, Tensor]:
    """The k nearest of some rows from whole lines in float64."""
    line = torch.cat([distances.tile(rows, c, torch.float64) for c in steps(len(distances.y))], dim=1)
    if own:
        line[torch.arange(len(rows)), rows] = torch.inf
    kth = line.kthvalue(k, dim=1).values
    slack = distances.relative_error(torch.float64) * (distances.xn[rows] + distances.yn.max() + kth)
    i, j = (line <= (kth + 2 * slack)[:, None]).nonzero(as_tuple=True)
    line.fill_(torch.inf)
    line[i, j] = direct_squared(distances.x, distances.y, rows[i], j)
    found, chosen = line.topk(k, dim=1, largest=False)
    return found, chosen
