"""Guided logits of several steps at once: every node of a tree is guided as the step it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit.guidance.base import Branch, Result, StepInfo
from genkit.samplers.autoregressive.guided import GuidedLogits, centre


class TreeLogits(GuidedLogits):
    """:class:`GuidedLogits` whose call may hold nodes of different steps, of one row and of different rows.

    Each node gets the prediction that decoding token by token would have given it, also from a guidance that changes over the
    steps: all branches that some node needs are evaluated, and combined node by node. A guidance that remembers earlier steps
    has no such prediction and is refused.
    """

    _steps: Tensor | None = None
    _ahead = 0

    def nodes(
        self,
        inputs: Tensor,
        steps: Tensor,
        total: int,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        ahead: int = 0,
    ) -> Tensor:
        """Feed nodes and guide them, (B, n, V).

        Args:
            inputs: (B, n), as in :meth:`logits`.
            steps: (B, n), the step that each node's prediction is.
            total: the number of steps.
            mask, positions: passed on to the network.
            ahead: branches that are needed up to so many steps later are evaluated too: what follows on these nodes cannot
                feed them to a branch that missed them.

        Raises:
            ValueError: the guidance depends on earlier steps, or on random numbers.
        """
        self._steps, self._ahead = steps.clamp(0, total - 1), ahead
        try:
            return self.logits(inputs, int(self._steps.min()), total, mask=mask, positions=positions)
        finally:
            self._steps = None

    def __call__(self, info: StepInfo) -> Result:
        if self._steps is None:
            return super().__call__(info)
        self._asked = ()
        self._check_stateless(self.state)
        steps = {min(step + i, info.total - 1) for step in self._steps.unique().tolist() for i in range(self._ahead + 1)}
        branches = tuple(dict.fromkeys(b for step in sorted(steps) for b in self._plan(step, info.total)))
        predictions = self.evaluate(info, branches)
        result = Result(self.guide(predictions, self._steps, info.total))
        if self.level != "none":
            self._record(info, predictions, result)
        return result

    def guide(self, predictions: Mapping[str, Tensor], steps: Tensor, total: int) -> Tensor:
        """The guided logits (B, n, V) of predictions of the same shape, by the name of the branch; the steps are (B, n).

        Where a step's plan has branches that are not among them, those nodes are the conditional prediction.
        """
        centred = {name: centre(z) for name, z in predictions.items()}
        out = torch.empty_like(next(iter(centred.values())))
        steps = steps.clamp(0, total - 1)
        for step in steps.unique().tolist():
            names = [b.name for b in self._plan(step, total)]
            at = steps == step
            if not set(names) <= set(centred):
                out[at] = centred.get("cond", next(iter(centred.values())))[at]
                continue
            chosen = {name: centred[name][at][:, None] for name in names}
            info = self._at(step, total, out.new_zeros(int(at.sum()), 1, 1))
            result, state = self.guidance.combine(info, chosen, self.guidance.init(len(info.x)))
            self._check_stateless(state)
            out[at] = result.denoised[:, 0]
        return out

    def _plan(self, step: int, total: int) -> tuple[Branch, ...]:
        branches = self.guidance.plan(self._at(step, total, torch.zeros(self.batch, 1, 1)), self.state)
        if "noise" in self.guidance.needs or any(b.mask is not None or b.transform is not None for b in branches):
            raise ValueError(
                f"guidance={self.guidance!r} treats samples or draws differently, which drafted tokens cannot follow"
            )
        return branches

    def _at(self, step: int, total: int, x: Tensor) -> StepInfo:
        progress = step / (total - 1) if total > 1 else 0.0
        return StepInfo(step, total, progress, "step", math.nan, math.nan, 1.0, 0.0, x)

    def _check_stateless(self, state: Any) -> None:
        if isinstance(state, Tensor):
            raise ValueError(
                f"guidance={self.guidance!r} remembers earlier steps, which drafted tokens do not have; turn its momentum off"
            )
        for part in state.values() if isinstance(state, Mapping) else state if isinstance(state, tuple | list) else ():
            self._check_stateless(part)
