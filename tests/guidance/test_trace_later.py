"""Rows of a trace that are made when they are read."""

from __future__ import annotations

import pickle

from genkit.guidance import Trace

made: list[int] = []


def row(step: int) -> dict[str, int]:
    made.append(step)
    return {"batch": 0, "step": step}


def test_rows_are_made_once_and_in_order() -> None:
    made.clear()
    first, second = Trace(), Trace()
    for trace in (first, second):
        trace.later(row, 0)
        trace.later(row, 1)
    first.extend(second)
    first.extend(Trace([{"batch": 0, "step": 7}]))
    assert made == []
    first.add({"batch": 9, "step": 8})
    assert made == [0, 1, 0, 1]
    assert first.rows is first.rows
    assert [(r["batch"], r["step"]) for r in first.rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7), (9, 8)]
    assert made == [0, 1, 0, 1]


def test_a_trace_is_pickled_as_its_rows() -> None:
    trace = Trace()
    trace.later(row, 3)
    copy = pickle.loads(pickle.dumps(trace))
    assert copy.rows == trace.rows == [{"batch": 0, "step": 3}]
