"""CFG(0), the unconditional prediction: one branch, alone and inside combinators that look at the conditional one."""

from __future__ import annotations

import pytest
import torch

from genkit.guidance import CFG, UNCOND, Adaptive, parse
from genkit.guidance.piecewise import Piecewise
from tests.toys import Run, step_info


def test_evaluates_the_unconditional_branch_only() -> None:
    run = Run(CFG(0.0), "euler")
    assert CFG(0.0).plan(step_info(torch.zeros(1, 1)), None) == (UNCOND,)
    assert run.nfe == [6] * 4
    assert all(set(labels) == {-1} for labels in run.main.labels)
    assert run.guided.trace.column("weight") == [0.0] * 6
    nearly = Run(CFG(1e-12), "euler")
    assert nearly.nfe == [12] * 4
    torch.testing.assert_close(run.out, nearly.out, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "Adaptive({})",
        "Adaptive({}, 1.001)",
        "Interval({}, 0.1, 2.0)",
        "Piecewise(({}, NoGuidance()), (1.0,))",
        "Rescaled({})",
        "Scheduled({}, 'sine')",
        "Sum({}, Autoguidance(2.0))",
        "ZeroInit({})",
    ],
)
def test_combinators_treat_it_as_the_limit_of_small_scales(text: str) -> None:
    zero, nearly = (Run(parse(text.format(f"CFG({w})")), "euler") for w in (0.0, 1e-12))
    torch.testing.assert_close(zero.out, nearly.out, rtol=0, atol=1e-8)
    assert all(a <= b for a, b in zip(zero.nfe, nearly.nfe, strict=True))


def test_adaptive_evaluates_both_branches_only_where_they_may_decide() -> None:
    assert Run(Adaptive(CFG(0.0), 1.001), "euler").nfe == [6] * 4
    assert Run(Adaptive(CFG(0.0), 0.5), "euler").nfe == Run(Adaptive(CFG(0.1), 0.5), "euler").nfe == [7] * 4


def test_samples_that_have_left_get_the_conditional_prediction() -> None:
    made = Adaptive(Piecewise((CFG(3.0), CFG(0.0)), (2,), "step"), 0.99)
    run = Run(made, "euler")
    assert run.guided.trace.column("branches")[2] == "cond+uncond"  # CFG(0) for some, the others have left
    assert len(set(run.nfe)) > 1
    for i in range(4):
        alone = Run(made, "euler", rows=(i,))
        torch.testing.assert_close(alone.out[0], run.out[i], rtol=0, atol=1e-9)
        assert alone.nfe == [run.nfe[i]]
