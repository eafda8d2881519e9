"""Sums of a kernel over all pairs of images, in float64 tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkit_eval.metrics.pairwise import steps

#: Takes rows (n, D) and (m, D) in float64 and gives (n, m).
Kernel = Callable[[Tensor, Tensor], Tensor]
STEP = 1024


def weighted_sum(kernel: Kernel, x: Tensor, weights: Tensor, diagonal: bool) -> Tensor:
    """``sum_ij w_bi w_bj k(x_i, x_j)`` (B,) for weights (B, N), over i != j alone unless ``diagonal``."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for rows in steps(len(x), STEP):
        left = x[rows].double()
        for columns in steps(rows.stop, STEP):
            tile = kernel(left, x[columns].double())
            if columns == rows and not diagonal:
                tile.fill_diagonal_(0)
            # The kernel is symmetric: a tile beside the diagonal stands for two.
            part = torch.einsum("bj,bj->b", weights[:, rows] @ tile, weights[:, columns])
            total += part if columns == rows else 2 * part
    return total


def row_means(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """Mean (N,) over the rows of ``y`` of the kernel with each row of ``x``."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for columns in steps(len(y), STEP):
        right = y[columns].double()
        for rows in steps(len(x), STEP):
            total[rows] += kernel(x[rows].double(), right).sum(dim=1)
    return total / len(y)


def ones(x: Tensor) -> Tensor:
    """Every row counted once, (1, N)."""
    return torch.ones(1, len(x), dtype=torch.float64)
