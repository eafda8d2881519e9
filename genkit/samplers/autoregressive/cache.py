"""Keys and values of an autoregressive run, allocated once.

Contract, for networks (which know only ``update``), decoding loops and drafters::

    cache = StaticCache.of(network, rows=2 * batch)       # or StaticCache(layers, rows, heads, length, head_dim, dtype, device)
    k, v = cache.update(layer, k, v, start)               # writes (R, heads, n, d) at start, returns all up to start + n (views)
    some = cache.rows(slice(0, batch))                    # the same storage, some rows; any index tensor works too, but copies
    cache.keep(path, start)                               # nodes start + path[b, j] move to start + j: the accepted path

``start`` is an int, or one per row (R,) for rows of different length: then what is returned reaches to the longest row, and the
mask given to the network must hide what lies beyond each row's own length (unwritten places hold zeros, or older values).
A cache has no length of its own: to go back, write at an earlier ``start``. Values are stored without their gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = slice | Tensor


class StaticCache:
    """Room for ``length`` positions of ``rows`` rows in every layer.

    Args:
        layers, rows, heads, length, head_dim: sizes; ``heads`` counts those of keys and values.
        dtype, device: of the stored values.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store = _zeros((2, layers, rows, heads, length, head_dim), dtype, device)
        self.index: Rows = slice(0, rows)

    @classmethod
    def of(cls, network: Any, rows: int, length: int | None = None) -> StaticCache:
        """A cache for a network, in the dtype and on the device of its parameters; ``length`` defaults to the network's own."""
        layers, heads, head_dim = network.cache_shape
        weight = next(network.parameters())
        return cls(layers, rows, heads, length or network.length, head_dim, weight.dtype, weight.device)

    @property
    def length(self) -> int:
        """Positions there is room for."""
        return self.store.shape[4]

    def rows(self, index: Rows) -> StaticCache:
        """A cache over some rows of the whole storage: what is written to it is written here."""
        view = object.__new__(StaticCache)
        view.store, view.index = self.store, index
        return view

    def update(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (R, heads, n, head_dim) from ``start`` on. Returns keys and values of positions 0 .. start + n - 1.

        Raises:
            ValueError: there is no room for them.
        """
        n = k.shape[2]
        end = (start if isinstance(start, int) else int(start.max())) + n
        if end > self.length:
            raise ValueError(f"length={self.length} of the cache is too short for {end} positions; make a longer one")
        if isinstance(start, int) and isinstance(self.index, slice):
            keys, values = self.store[:, layer, self.index].unbind()
            keys[:, :, start:end], values[:, :, start:end] = k.detach(), v.detach()
            return keys[:, :, :end], values[:, :, :end]
        for store, new in ((self.store[0, layer], k.detach()), (self.store[1, layer], v.detach())):
            if isinstance(start, int):
                store[self.index, :, start:end] = new
            else:
                rows, places = self._row_numbers()[:, None], self._places(start, n)
                store[rows, :, places] = new.to(store.dtype).transpose(1, 2)
        return self.store[0, layer, self.index, :, :end], self.store[1, layer, self.index, :, :end]

    def keep(self, path: Tensor, start: int | Tensor) -> None:
        """Move the nodes ``start + path[b, j]`` to ``start + j``, in every layer.

        Args:
            path: (R, m) numbers of nodes, rising along a path of the tree; -1 fills up rows that keep fewer.
            start: where the nodes begin, an int or one per row (R,).
        """
        path = path.to(self.store.device)
        begin = torch.as_tensor(start, device=path.device).reshape(-1, 1)
        rows = self._row_numbers()[:, None]
        moved = self.store[:, :, rows, :, begin + path.clamp_min(0)]
        self.store[:, :, rows, :, self._places(begin.expand(len(path), 1)[:, 0], path.shape[1])] = moved

    def grown(self, rows: int, filled: int | None = None) -> StaticCache:
        """A cache of ``rows`` rows in all whose first rows are this one's, up to position ``filled`` if that is given."""
        new = object.__new__(StaticCache)
        shape = list(self.store.shape)
        shape[2] = rows
        new.store, new.index = _zeros(tuple(shape), self.store.dtype, self.store.device), slice(0, rows)
        new.store[:, :, : self.store.shape[2], :, :filled] = self.store[..., :filled, :]
        return new

    def _row_numbers(self) -> Tensor:
        if isinstance(self.index, slice):
            return torch.arange(self.index.start or 0, self.index.stop, device=self.store.device)
        return self.index.to(self.store.device)

    def _places(self, start: Tensor, n: int) -> Tensor:
        return start.to(self.store.device)[:, None] + torch.arange(n, device=self.store.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros: under a mask, a leftover NaN would still spoil the sum. On the CPU, memory is taken as it is first written to."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(count + 64, np.uint8))
    begin = -raw.data_ptr() % 64  # what vector units like
    return raw[begin : begin + count].view(dtype).view(shape)
