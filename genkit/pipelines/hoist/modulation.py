"""What AdaLN does in each block of a class-conditional DiT, for many steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genkit.pipelines.attach.replace import replaced
from genkit.pipelines.hoist.memo import Count, Seen, known, ours


def norms(network: nn.Module) -> list[Any]:
    """The AdaLN of a diffusers network that embed time and label by themselves, once in each block."""
    return [
        m
        for m in network.modules()
        if type(m).__name__ == "AdaLayerNormZero"
        and type(m.emb).__name__ == "CombinedTimestepLabelEmbeddings"
        and all(map(ours, m.modules()))
    ]


class Asked(NamedTuple):
    """What the tables were asked for last."""

    timestep: Seen
    labels: Seen
    dtype: torch.dtype

    def same(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> bool:
        return self.timestep.same(timestep) and self.labels.same(labels) and self.dtype == dtype


class Modulations:
    """Tables of shift, scale and gate (times x labels, 6 D), one for each block.

    They are made when a pair of time and label comes that is not in them: for this time, the planned ones after it and the
    labels of the call, in one product per block.

    Args:
        blocks: what :func:`norms` found.
        planned: gives the timesteps of the run, in their order.
        memory: bytes the tables may take; at least one step is in them.
        count: counts the modulations of one block.
    """

    def __init__(self, blocks: list[Any], planned: Callable[[], Sequence[float]], memory: int, count: Count) -> None:
        self.blocks, self.planned, self.memory, self.count = blocks, planned, memory, count
        self.place: dict[tuple[float, int], int] = {}
        self.tables: list[Tensor] = []
        self.first = torch.empty(0)  # the embedding of the first block, which the network uses again at its end
        self.weights: list[Seen] = []
        self.asked: Asked | None = None
        self.rows = torch.empty(0)
        self.reached = 0  # the block that asked last: where one before it asks, another pass has begun
        self.making = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for i, norm in enumerate(self.blocks):
                stack.enter_context(replaced(norm, "forward", self._answer(i, norm)))
            stack.enter_context(replaced(self.blocks[0].emb, "forward", self._embedding))
            yield

    def _answer(self, i: int, norm: Any) -> Callable[..., Any]:
        def answer(original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            given = dict(zip(("x", "timestep", "class_labels", "hidden_dtype", "emb"), args, strict=False), **kwargs)
            rows = self._rows(i, given)
            if rows is None:
                return original(*args, **kwargs)
            self.count.reused += len(rows)
            shift, scale, *others = self.tables[i][rows].chunk(6, 1)
            gate, shift_mlp, scale_mlp, gate_mlp = others
            return norm.norm(given["x"]) * (1 + scale[:, None]) + shift[:, None], gate, shift_mlp, scale_mlp, gate_mlp

        return answer

    def _embedding(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = dict(zip(("timestep", "class_labels", "hidden_dtype"), args, strict=False), **kwargs)
        rows = None if self.making else self._rows(len(self.blocks), given)
        return original(*args, **kwargs) if rows is None else self.first[rows]

    def _rows(self, block: int, given: Mapping[str, Any]) -> Tensor | None:
        """Which rows of the tables a call needs, found once for all blocks; None where the tables cannot serve."""
        timestep, labels, dtype = (given.get(name) for name in ("timestep", "class_labels", "hidden_dtype"))
        if torch.is_grad_enabled() or not (known(timestep) and known(labels)) or timestep.ndim != 1 or dtype is None:
            return None
        again, self.reached = block > self.reached, block
        if again and self.asked is not None and self.asked.same(timestep, labels, dtype):
            return self.rows
        self.asked = None
        own = [w for norm in self.blocks for w in norm.parameters()]
        if torch.is_autocast_enabled(labels.device.type) or any(n.training for n in self.blocks) or not all(map(known, own)):
            return None
        times, classes = timestep.float().tolist(), labels.tolist()
        pairs = list(zip(times * len(classes) if len(times) == 1 else times, classes, strict=True))
        if not self._serve(own, dtype, labels.device) or any(pair not in self.place for pair in pairs):
            self._make(dict.fromkeys(times), dict.fromkeys(classes), labels.device, dtype)
            self.weights = list(map(Seen.now, own))
        self.rows = torch.tensor([self.place[pair] for pair in pairs], device=labels.device)
        self.asked = Asked(Seen.now(timestep), Seen.now(labels), dtype)
        return self.rows

    def _serve(self, weights: list[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the tables were made from these weights, as they are, for this dtype and device."""
        if self.first.dtype != dtype or self.first.device != device or len(weights) != len(self.weights):
            return False
        return all(a is b.tensor and b.unchanged() for a, b in zip(weights, self.weights, strict=True))

    def _make(self, now: Mapping[float, None], labels: dict[int, None], device: torch.device, dtype: torch.dtype) -> None:
        embedder = self.blocks[0].emb.class_embedder
        if embedder.embedding_table.num_embeddings > embedder.num_classes:
            labels[embedder.num_classes] = None  # of no class: guidance may ask for it later
        plan = torch.as_tensor(self.planned(), dtype=torch.float32).tolist()
        start = next((i for i, time in enumerate(plan) if time in now), len(plan))
        times = list(dict.fromkeys([*now, *plan[start:]]))
        width = sum(norm.linear.out_features for norm in self.blocks) * dtype.itemsize
        times = times[: max(len(now), self.memory // (width * len(labels)))]
        self.place = {(t, y): i * len(labels) + j for i, t in enumerate(times) for j, y in enumerate(labels)}
        t = torch.tensor(times, device=device).repeat_interleave(len(labels))
        y = torch.tensor(list(labels), device=device).repeat(len(times))
        self.making = True
        try:
            embedded = [norm.emb(t, y, hidden_dtype=dtype) for norm in self.blocks]
        finally:
            self.making = False
        self.first = embedded[0]
        self.tables = [norm.linear(norm.silu(e)) for norm, e in zip(self.blocks, embedded, strict=True)]
        self.count.computed += len(self.blocks) * len(self.place)


__all__ = ["Modulations", "norms"]
