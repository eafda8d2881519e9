"""Rows that are not evaluated take no time."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from torch import nn

from genkit.pipelines.attach import attach
from tests.attach.tiny import CASES, denoisers

STEPS, BATCH = 8, 4
WEIGHT = torch.randn(448, 448, generator=torch.Generator().manual_seed(0))


@contextmanager
def costly(net: nn.Module, rows: list[int]) -> Iterator[None]:
    """Inside, the network is one matrix product for each row."""
    original = net.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(len(x))
        for _ in range(len(x)):
            WEIGHT @ WEIGHT
        return (0.9 * x,)

    net.forward = forward
    try:
        yield
    finally:
        del net.forward


def seconds(name: str, guidance: str) -> float:
    """Of the processor, for one call of the pipeline."""
    case = CASES[name]
    with attach(case.pipe, guidance):
        start = time.process_time()
        case(2.0, BATCH, num_inference_steps=STEPS)
        return time.process_time() - start


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_time_is_proportional_to_rows(name: str) -> None:
    """The least of several times: what else the machine does only ever adds."""
    part, every = "Interval(CFG(3.0), 2, 3, 'step')", "CFG(3.0)"
    rows: dict[str, list[int]] = {part: [], every: []}
    least = dict.fromkeys(rows, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for work take time too
    try:
        for _ in range(12):
            for guidance in rows:
                rows[guidance].clear()
                with costly(denoisers(CASES[name].pipe)[0], rows[guidance]):
                    least[guidance] = min(least[guidance], seconds(name, guidance))
            ratio = least[part] / least[every]
            if ratio == pytest.approx(10 / 16, rel=0.15):
                break
    finally:
        torch.set_num_threads(threads)
    assert sum(rows[part]) == (STEPS + 2) * BATCH
    assert sum(rows[every]) == 2 * STEPS * BATCH
    assert ratio == pytest.approx(10 / 16, rel=0.2), least
