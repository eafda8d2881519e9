"""The tiled engine for nearest-neighbour and kernel metrics: exact, with memory that does not grow with N x N."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of one float64 tile: 2**21 is 16 MiB.
TILE_ENTRIES = 2**21
# Products of centred float64 rows are off by a few ulp of |x|^2 + |y|^2; anything closer than this to a limit is computed again.
DOUBT = 1e-11


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """Row slices so that one slice times ``columns`` stays within ``TILE_ENTRIES``."""
    step = max(1, TILE_ENTRIES // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def direct_squared(x: Tensor, y: Tensor, chunk: int = 2**14) -> Tensor:
    """``|x_i - y_i|^2`` of paired rows (P, D), by differences: equal distances come out as equal numbers."""
    return torch.cat([(a - b).square().sum(dim=-1) for a, b in zip(x.split(chunk), y.split(chunk), strict=True)])


class Distances:
    """Squared distances between the rows of ``x`` (N, D) and ``y`` (M, D), a tile of rows at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.double(), y.double()
        centre = self.y.mean(dim=0)
        self._xc, self._yc = self.x - centre, self.y - centre
        self._xn, self._yn = self._xc.square().sum(dim=1), self._yc.square().sum(dim=1)

    def tile(self, rows: slice) -> Tensor:
        """Squared distances (rows, M) by one product of centred rows."""
        product = self._xc[rows] @ self._yc.T
        return product.mul_(-2).add_(self._xn[rows, None]).add_(self._yn).clamp_(min=0)

    def doubt(self, rows: slice) -> Tensor:
        """How far off ``tile(rows)`` may be, (rows, 1)."""
        return DOUBT * (self._xn[rows, None] + self._yn.max())

    def within(self, rows: slice, tile: Tensor, limit: Tensor) -> Tensor:
        """``distance^2 <= limit`` (rows, M), with entries too close to call settled by direct differences."""
        inside = tile <= limit
        i, j = ((tile - limit).abs() <= self.doubt(rows)).nonzero(as_tuple=True)
        for a, b in zip(i.split(2**14), j.split(2**14), strict=True):
            exact = direct_squared(self.x[rows][a], self.y[b])
            inside[a, b] = exact <= limit.expand_as(tile)[a, b]
        return inside


def nearest_squared(x: Tensor, k: int) -> Tensor:
    """Squared distances (N, k) from each row to its k nearest other rows, ascending; ValueError unless 1 <= k < N."""
    n = x.shape[0]
    if not 1 <= k < n:
        raise ValueError(f"k: got {k} for {n} images; 1 to {n - 1} works")
    distances = Distances(x, x)
    spare = min(n, k + 5)
    found = []
    for rows in tiles(n, n):
        tile = distances.tile(rows)
        here = torch.arange(rows.start, rows.stop)
        tile[here - rows.start, here] = torch.inf
        candidates = tile.topk(spare, dim=1, largest=False).indices
        exact = direct_squared(distances.x[here].repeat_interleave(spare, 0), distances.y[candidates.flatten()]).reshape(
            -1, spare
        )
        exact[candidates == here[:, None]] = torch.inf
        found.append(exact.sort(dim=1).values[:, :k])
    return torch.cat(found)
