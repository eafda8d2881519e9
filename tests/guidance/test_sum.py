"""Sum: which rows it evaluates, what it adds up, and how it passes a scale on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from genkit.denoiser import Guided
from genkit.guidance import (
    APG,
    CFG,
    COND,
    UNCOND,
    Adaptive,
    Branch,
    Guidance,
    Interval,
    NoGuidance,
    Result,
    Scheduled,
    StepInfo,
    parse,
    registry,
)
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.base import Host, Need, Perturbation
from genkit.guidance.sum import Sum
from genkit.noise import VE
from tests.toys import LABELS, SHAPE, Run, conditions, golden, reference, step_info

ARRAYS, META = golden("guidance/multi_branch")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class _Push(Guidance):
    """``D_c + (w - 1)(D_c - D_other)`` with a branch of any name and content."""

    scale: float
    branch: Branch

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,) if self.weight(info) == 1 else (COND, self.branch)

    def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
        cond = predictions["cond"]
        if self.weight(info) == 1:
            return Result(cond), state
        return Result(cond + (self.weight(info) - 1) * (cond - predictions[self.branch.name])), state


# ---- several branches, against recorded outputs ----


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    axes = tuple(range(1, cond.ndim))
    return phi * guided * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True) + (1 - phi) * guided


def as_sum(case: dict[str, Any]) -> Guidance:
    """The recorded combination in our scales: theirs of an extra branch is ours minus 1, but for modality."""
    skip = Branch("skip", perturbation=Perturbation("skip"))
    if case["guider"] == "SkipLayerGuidance":
        w = case["guidance_scale"] + case.get("use_original_formulation", False)
        return Sum(CFG(w), _Push(1 + case["skip_layer_guidance_scale"], skip))
    two = Sum(CFG(case["guidance_scale"]), _Push(1 + case["stg_scale"], skip))
    return Sum(two, _Push(case["modality_scale"], Branch("modality", condition="modality")))


@pytest.mark.parametrize("case", [pytest.param(c, id=c["key"]) for c in META["cases"]])
def test_recorded_sums_of_branches(case: dict[str, Any]) -> None:
    made, cond = as_sum(case), torch.from_numpy(ARRAYS["cond"])
    info, state = step_info(cond), made.init(len(cond))
    planned = [b.name for b in made.plan(info, state)]
    assert planned == [n.split("(")[0] for n in case["branches"] if n != "modality" or case["modality_scale"] != 1]
    out = made.combine(info, {n: torch.from_numpy(ARRAYS[n]) for n in planned}, state)[0].denoised
    out = rescaled(out, cond, case.get("guidance_rescale", 0.0))
    torch.testing.assert_close(out, torch.from_numpy(ARRAYS[case["key"]]), rtol=2e-6, atol=5e-6)


# ---- what it adds ----

QUICK = [text for cls in registry().values() for text in cls.examples if "gradient" not in parse(text).needs]


@pytest.mark.parametrize("text", QUICK)
def test_nothing_added_is_nothing_changed(text: str) -> None:
    """Whatever the method, and whatever it asks of its host; at most the plain D_c is evaluated in addition."""
    inner, run = reference(parse(text)), Run(Sum(NoGuidance(), parse(text)))
    close(run.out, inner.out)
    evaluations = len(inner.guided.trace.rows)
    assert all(n <= more <= n + evaluations for n, more in zip(inner.nfe, run.nfe, strict=True))


@pytest.mark.parametrize("other", ["CFG(3.0)", "APG(4.0, eta=0.5, momentum=-0.5)", "Adaptive(CFG(3.0), 0.99)"])
def test_a_part_without_guidance_changes_nothing(other: str) -> None:
    inner = reference(guidance := parse(other))
    for made in (Sum(guidance, CFG(1.0)), Sum(NoGuidance(), guidance), Sum(guidance, Interval(CFG(5.0), 9.0, 10.0))):
        run = Run(made)
        close(run.out, inner.out)
        assert run.nfe == inner.nfe


def test_equal_pushes_add_up_and_cost_one_branch() -> None:
    run, cfg = Run(Sum(CFG(2.0), Sum(CFG(1.5), CFG(0.8)))), reference(CFG(2.3))
    close(run.out, cfg.out)
    assert run.nfe == cfg.nfe
    assert run.guided.ledger.calls == cfg.guided.ledger.calls


def test_each_part_keeps_its_own_state() -> None:
    """Two averages with different momentum, against the formula written out over the run's own predictions."""
    made = Sum(APG(3.0, eta=1.0, momentum=-0.5), APG(2.0, eta=1.0, momentum=0.25))
    first = second = torch.zeros(4, *SHAPE, dtype=torch.float64)
    for cond, uncond, out in replay(made):
        first, second = (cond - uncond) - 0.5 * first, (cond - uncond) + 0.25 * second
        close(out, cond + 2 * first + 1 * second)


def replay(made: Guidance) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Predictions and estimate of every step of an Euler run."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @dataclass(frozen=True)
    class _Watch(Guidance):
        inner: Guidance

        def init(self, batch: int) -> Any:
            return self.inner.init(batch)

        def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
            return self.inner.plan(info, state)

        def combine(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
            result, state = self.inner.combine(info, predictions, state)
            seen.append((predictions["cond"], predictions["uncond"], result.denoised))
            return result, state

    assert Run(_Watch(made), "euler").nfe == [12] * 4
    return seen


def test_directions_and_scores_add_up() -> None:
    @dataclass(frozen=True)
    class _Given(Guidance):
        direction: float | None = None
        score: float | None = None

        def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
            return (COND,)

        def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
            cond = predictions["cond"]
            given = [None if v is None else torch.full_like(cond, v) for v in (self.direction, self.score)]
            return Result(cond + 1, given[0], {"agreement": 0.5, "weight": 0.0}, given[1]), state

    def summed(first: Guidance, second: Guidance) -> Result:
        x = torch.full((2, 1), 3.0)
        made = Sum(first, second)
        return made.combine(step_info(x), {"cond": x}, made.init(2))[0]

    both = summed(_Given(5.0, 0.5), _Given(7.0, 0.25))
    assert both.direction is not None
    assert both.score is not None
    assert both.denoised.flatten().tolist() == [5.0, 5.0]  # 3 + 1 + 1
    assert both.direction.flatten().tolist() == [9.0, 9.0]  # 3 + 2 + 4
    assert both.score.flatten().tolist() == [0.75, 0.75]
    assert both.stats == {"agreement": 0.5}
    one = summed(_Given(), _Given(7.0, 0.25))  # without a direction of its own the estimate is the direction
    assert one.direction is not None
    assert one.score is not None
    assert one.direction.flatten().tolist() == [8.0, 8.0]
    assert one.score.flatten().tolist() == [0.25, 0.25]
    none = summed(_Given(), _Given())
    assert none.direction is None
    assert none.score is None


def test_hooks_of_both_parts_are_called() -> None:
    @dataclass(frozen=True)
    class _Hooked(Guidance):
        shift: float
        requires: ClassVar[frozenset[Need]] = frozenset({"prepare", "refine"})

        def init(self, batch: int) -> Any:
            return 0

        def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
            return state + 1

        def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
            return (COND,)

        def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
            return Result(predictions["cond"]), state

        def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
            return result._replace(denoised=result.denoised + self.shift * state), state

    made = Sum(Sum(_Hooked(1.0), CFG(1.0)), _Hooked(10.0))
    assert made.needs == {"prepare", "refine"}
    guided = Guided(Same(), made, conditions(LABELS), 4)
    x = torch.zeros(4, *SHAPE, dtype=torch.float64)
    assert [float(guided(step_info(x, i, 2, sigma=0.5**i)).denoised.max()) for i in range(2)] == [11.0, 22.0]


class Same:
    """D = x."""

    path = VE

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        return x


# ---- branches ----


def test_branches_of_equal_name_and_different_content_are_both_evaluated() -> None:
    a, b = Branch("other", condition="uncond"), Branch("other", condition="uncond", model="weak")
    made = Sum(_Push(2.0, a), Sum(_Push(3.0, b), _Push(1.5, b._replace(name="more"))))
    planned = made.plan(step_info(torch.zeros(1, 1)), made.init(1))
    assert len({branch.name for branch in planned}) == len(planned) == 3
    assert {(branch.condition, branch.model) for branch in planned} == {("cond", "main"), ("uncond", "main"), ("uncond", "weak")}
    run = Run(made, "euler")
    apart = Run(Sum(CFG(2.0), Autoguidance(3.5, condition="uncond")), "euler")
    close(run.out, apart.out)
    assert run.nfe == apart.nfe == [18] * 4


@dataclass(frozen=True)
class _Some(Guidance):
    """CFG that counts on rows it did not ask for being the conditional prediction."""

    scale: float
    rows: tuple[bool, ...]

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return COND, UNCOND._replace(mask=torch.tensor(self.rows))

    def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
        return Result(predictions["uncond"].lerp(predictions["cond"], self.scale)), state


def test_masks_are_united_and_each_part_sees_its_own_rows() -> None:
    one, two = (True, False, True, False), (True, True, False, False)
    run = Run(Sum(_Some(3.0, one), _Some(2.0, two)), "euler")
    assert run.nfe == [12, 12, 12, 6]
    for i, scale in enumerate([4.0, 2.0, 3.0, 1.0]):
        close(run.out[i], reference(CFG(scale), "euler").out[i])
    whole = Run(Sum(CFG(2.0), _Some(3.0, one)), "euler")
    assert whole.nfe == [12] * 4
    for i, scale in enumerate([4.0, 2.0, 4.0, 2.0]):
        close(whole.out[i], reference(CFG(scale), "euler").out[i])


def test_samples_that_stop_at_different_steps() -> None:
    early, late = Adaptive(CFG(3.0), 0.98), Adaptive(CFG(2.0), 0.991)
    run = Run(Sum(early, late))
    assert len(set(run.nfe)) > 1
    for i in range(4):
        alone = Run(Sum(early, late), rows=(i,))
        close(alone.out[0], run.out[i])
        assert alone.nfe == [run.nfe[i]]


# ---- scale ----


def test_an_override_multiplies_both_pushes_by_one_gain() -> None:
    made = Sum(CFG(5.0), Autoguidance(3.0))
    assert made.scale == 5.0
    x = torch.zeros(1, 1)
    for weight, expected in ((None, [5.0, 3.0]), (3.0, [3.0, 2.0]), (9.0, [9.0, 5.0]), (1.0, [1.0, 1.0]), (-3.0, [-3.0, -1.0])):
        info = step_info(x, weight=weight)
        assert [part.weight(at) for part, at in zip(made.parts, made.seen(info), strict=True)] == expected
        assert made.weight(info) == expected[0]
    assert Sum(CFG(0.5), CFG(0.8)).scale == 0.5
    assert Sum(NoGuidance(), CFG(1.0)).scale == 1.0


def test_a_scheduled_sum_is_the_sum_of_scheduled_parts() -> None:
    outside = Run(Scheduled(Sum(CFG(3.0), Autoguidance(2.0)), "cosine"))
    inside = Run(Sum(Scheduled(CFG(3.0), "cosine"), Scheduled(Autoguidance(2.0), "cosine")))
    close(outside.out, inside.out)
    assert outside.nfe == inside.nfe


def test_errors() -> None:
    with pytest.raises(TypeError, match="Sum: second=3 must be a guidance"):
        Sum(CFG(2.0), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Sum: first='CFG' must be a guidance"):
        Sum("CFG", CFG(2.0))  # type: ignore[arg-type]
