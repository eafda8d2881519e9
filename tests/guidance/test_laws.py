"""Laws that hold for every registered guidance, on whole sampling runs with an exact denoiser.

Nothing here names a method: a new class is covered as soon as it exists, through its ``examples``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit import guidance as guidance_package
from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import (
    APG,
    CFG,
    COND,
    Adaptive,
    Branch,
    Guidance,
    Interval,
    NoGuidance,
    Result,
    Scheduled,
    StepInfo,
    base,
    parse,
    registry,
)
from genkit.noise import FLOW, VE, VP
from genkit.random import Gaussian
from genkit.samplers.diffusion import SAMPLERS, Sampler, sample
from genkit.samplers.diffusion.loop import OFFERED
from tests.gaussians import NOISE_OPTIONS
from tests.toys import (
    LABELS,
    MAIN,
    OTHERS,
    SHAPE,
    WEAK,
    Run,
    at_scale,
    conditions,
    reference,
    step_info,
    suitable,
    with_parts,
)

EXAMPLES = [text for cls in registry().values() for text in cls.examples] + [
    # on the toy model the samples of a batch leave these at different steps
    "Adaptive(APG(4.0, momentum=-0.5), 0.991)",
    "Interval(Adaptive(Scheduled(APG(3.0, eta=0.5, threshold=2.0), 'sine'), 0.98), 0.2, 5.0)",
]
PATHS = {"ve": VE, "vp": VP, "flow": FLOW}

every_example = pytest.mark.parametrize("text", EXAMPLES)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes defined in a test are forgotten after it."""
    monkeypatch.setattr(base, "_CLASSES", dict(base._CLASSES))


def unequal(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def fits(made: Guidance, solver: Sampler) -> bool:
    return (made.needs & OFFERED) <= solver.offers


def sampler_of(made: Guidance) -> str:
    return suitable("heun", made).name


def guided(made: Guidance, index: list[int]) -> Guided:
    return Guided({"main": MAIN, "weak": WEAK, **OTHERS}, made, conditions(LABELS[index]), len(index), seeds=index)


def start_of(index: list[int]) -> Tensor:
    return 3.0 * Gaussian(index)(torch.empty(len(index), *SHAPE, dtype=torch.float64))


# ---- the object ----


@pytest.mark.parametrize("name", sorted(registry()))
def test_class_has_examples_of_itself(name: str) -> None:
    cls = registry()[name]
    assert cls.examples, f"{name} needs examples: they are shown to users and put through the laws"
    assert all(type(parse(text)) is cls for text in cls.examples)


@every_example
def test_repr_reads_back(text: str) -> None:
    made = parse(text)
    again = parse(repr(made))
    assert again == made
    assert hash(again) == hash(made)
    assert repr(again) == repr(made)
    assert len({made, again, NoGuidance()}) == 2 - (made == NoGuidance())


@pytest.mark.parametrize(
    "made",
    [
        CFG(-2.5),
        CFG(7),
        CFG(1e-300),
        APG(4.0, threshold=math.inf),
        APG(4, eta=-1, momentum=-0.999, threshold=3),
        Interval(CFG(3.0), 0, math.inf),
        Interval(CFG(3.0), 0.5, math.inf, unit="step"),
        Adaptive(CFG(2.0), threshold=-1),
        Scheduled(Interval(Adaptive(APG(4.0), 0.5), 1, 2), shape="power_cosine", power=1e-3, preserve_mean=False),
    ],
    ids=repr,
)
def test_repr_of_unusual_numbers_reads_back(made: Guidance) -> None:
    assert parse(repr(made)) == made


def test_numbers_become_python_floats() -> None:
    made = CFG(np.float64(3.5))
    assert repr(made) == "CFG(scale=3.5)"
    assert repr(CFG(3)) == repr(CFG(3.0)) == "CFG(scale=3.0)"
    assert parse(repr(made)) == made == CFG(3.5)
    assert parse(repr(Interval(APG(np.float64(2.0)), np.float64(0.5), np.float64(2.5)))).high == 2.5  # type: ignore[attr-defined]


@every_example
def test_object_is_frozen(text: str) -> None:
    made = parse(text)
    before = repr(made)
    for name in [f.name for f in fields(made)] + ["something_new"]:
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 2.0)
    Run(made)
    assert repr(made) == before
    assert set(vars(made)) == {f.name for f in fields(made)}  # a run leaves nothing behind in it


@every_example
def test_any_other_scale_is_another_object(text: str) -> None:
    made = parse(text)
    other = at_scale(made, 9.75)
    assert (other == made) == (made.weight(step_info(torch.zeros(1, 1))) == 1 and isinstance(made, NoGuidance))


# ---- what a run gives ----


@every_example
def test_scale_1_is_the_conditional_prediction_alone(text: str) -> None:
    made = at_scale(parse(text), 1.0)
    plain, run = reference(NoGuidance(), sampler_of(made)), Run(made)
    assert torch.equal(run.out, plain.out)
    assert run.nfe == plain.nfe
    assert all(set(labels) == {0, 1, 2} for labels in run.main.labels)


@every_example
def test_weight_override_1_plans_only_cond(text: str) -> None:
    made = parse(text)
    x = torch.ones(4, *SHAPE, dtype=torch.float64)
    for i in range(6):
        info = step_info(x, i, 6, sigma=1.0, weight=1.0)
        state = made.init(4)
        assert made.plan(info, state) == (COND,)
        assert torch.equal(made.combine(info, {"cond": 2 * x}, state)[0].denoised, 2 * x)


@every_example
@pytest.mark.parametrize(("high", "unit"), [(math.inf, "sigma"), (math.inf, "step"), (1.0, "fraction")])
def test_interval_of_everything_is_inner(text: str, high: float, unit: Any) -> None:
    inner, whole = reference(parse(text)), Run(Interval(parse(text), 0.0, high, unit))
    assert torch.equal(whole.out, inner.out)
    assert whole.nfe == inner.nfe


@every_example
@pytest.mark.parametrize(("low", "high", "unit"), [(1.0, 1.0, "sigma"), (90.0, 95.0, "step"), (0.4, 0.4, "fraction")])
def test_empty_interval_is_the_conditional_prediction(text: str, low: float, high: float, unit: Any) -> None:
    made = Interval(parse(text), low, high, unit)
    plain, empty = reference(NoGuidance(), sampler_of(made)), Run(made)
    assert torch.equal(empty.out, plain.out)
    assert empty.nfe == plain.nfe


@every_example
def test_adaptive_that_never_stops_is_inner(text: str) -> None:
    inner, adaptive = reference(parse(text)), Run(Adaptive(parse(text), threshold=1.001))
    assert torch.equal(adaptive.out, inner.out)
    assert adaptive.nfe == inner.nfe


@every_example
def test_constant_schedule_is_inner(text: str) -> None:
    inner, scheduled = reference(parse(text)), Run(Scheduled(parse(text), "constant"))
    assert torch.equal(scheduled.out, inner.out)
    assert scheduled.nfe == inner.nfe


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 3.0, 12.0])
def test_apg_with_everything_off_is_cfg(scale: float) -> None:
    cfg = reference(CFG(scale))
    for off in (APG(scale, eta=1.0), APG(scale, eta=1.0, threshold=math.inf), APG(scale, eta=1.0, threshold=1e9)):
        run = Run(off)
        assert unequal(run.out, cfg.out) < 1e-9
        assert run.nfe == [n if scale else 2 * n for n in cfg.nfe]  # CFG(0) evaluates the unconditional branch only


def in_space(made: Guidance, space: noise.Space) -> Guidance:
    """The same guidance whose innermost methods, and combinators that work in a space, see their predictions in another."""
    if "space" in [f.name for f in fields(made)]:
        made = replace(made, space=space)
    if made.parts:
        return with_parts(made, lambda part: in_space(part, space))
    cls = type(f"_{type(made).__name__}In{space}", (type(made),), {"space": space})
    return cls(**{f.name: getattr(made, f.name) for f in fields(made)})


def at_home(made: Guidance, space: noise.Space) -> bool:
    """Whether the space is the native one of all that is not affine in it already."""
    return (made.affine or made.space == space) and all(at_home(part, space) for part in made.parts)


def affine(made: Guidance) -> bool:
    return made.affine and all(affine(part) for part in made.parts)


@every_example
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("space", ["eps", "v", "flow"])
def test_affine_rules_agree_in_every_space(text: str, space: noise.Space, path: str) -> None:
    x0 = reference(parse(text), "euler", PATHS[path])
    other = Run(in_space(parse(text), space), "euler", path=PATHS[path])
    difference = unequal(other.out, x0.out)
    if not affine(parse(text)) and not at_home(parse(text), space):
        assert difference > 1e-3, f"{text} is the same in every space: its class can say affine = True"
    else:
        assert difference < 1e-9
        assert other.nfe == x0.nfe


@every_example
def test_ledger_counts_the_rows_of_each_sample(text: str) -> None:
    run = reference(parse(text))
    rows = [a + b for a, b in zip(run.main.rows(4), run.weak.rows(4), strict=True)]
    assert run.nfe == rows
    assert run.guided.ledger.calls == len(run.main.ids) + len(run.weak.ids)
    assert sum(r["rows"] for r in run.guided.trace.rows) == sum(rows)


@every_example
def test_planned_branches_are_the_evaluated_ones(text: str) -> None:
    run = reference(parse(text))
    calls = iter(run.log)
    for row in run.guided.trace.rows:
        labels: list[int] = []
        while len(labels) < row["rows"]:  # one call for each network
            labels += next(calls)
        assert len(labels) == row["rows"]
        assert (-1 in labels) == ("uncond" in row["branches"].split("+"))
    assert next(calls, None) is None


@every_example
@pytest.mark.parametrize("sampler", ["euler", "heun(churn=20)", "euler_ancestral", "dpmpp_2m"])
def test_permuting_the_batch_permutes_the_result(text: str, sampler: str) -> None:
    order = (2, 0, 3, 1)
    run, permuted = reference(parse(text), sampler), Run(parse(text), sampler, rows=order)
    assert unequal(permuted.out, run.out[list(order)]) < 1e-9
    assert permuted.nfe == [run.nfe[i] for i in order]


@every_example
def test_a_row_alone_is_the_row_in_its_batch(text: str) -> None:
    run = reference(parse(text), "heun(churn=20)")
    for i in range(4):
        alone = Run(parse(text), "heun(churn=20)", rows=(i,))
        assert unequal(alone.out[0], run.out[i]) < 1e-9
        assert alone.nfe == [run.nfe[i]]


@every_example
def test_two_runs_of_one_object_do_not_touch(text: str) -> None:
    made = parse(text)
    if made.needs & OFFERED:
        pytest.skip("the loop below is Euler's")
    separate = [Run(made, "euler", rows=rows, steps=5).out for rows in ((0, 1), (2, 3, 0))]

    runs = [guided(made, [0, 1]), guided(made, [2, 3, 0])]
    states = [start_of([0, 1]), start_of([2, 3, 0])]
    grid = noise.karras(5, 0.05, 3.0).tolist()
    for i in range(5):
        for k, x in enumerate(states):
            info = StepInfo(i, 5, i / 4, "step", grid[i], grid[i + 1], 1.0, grid[i], x)
            denoised = runs[k](info).absorbed(info).denoised
            states[k] = denoised + grid[i + 1] / grid[i] * (x - denoised)
    for x, alone in zip(states, separate, strict=True):
        assert unequal(x, alone) < 1e-9


def test_the_toy_model_lets_samples_leave_one_by_one() -> None:
    assert all(len(set(reference(parse(text)).nfe)) > 1 for text in EXAMPLES[-2:])


# ---- random numbers ----


@every_example
def test_guidance_leaves_the_global_generator_alone(text: str) -> None:
    before = torch.get_rng_state()
    Run(parse(text), "heun(churn=20)")
    assert torch.equal(torch.get_rng_state(), before)


NAMES = sorted(SAMPLERS)
#: Every example meets a few samplers, and every sampler a third of the examples.
PAIRS = [(text, name) for i, text in enumerate(EXAMPLES) for k, name in enumerate(NAMES) if (i + k) % 3 == 0]


@pytest.mark.parametrize(("text", "sampler"), PAIRS)
def test_no_number_is_drawn_where_its_scale_is_0(text: str, sampler: str) -> None:
    def refuse(like: Tensor, step: int) -> Tensor:
        raise AssertionError(f"noise drawn in step {step}")

    solver = SAMPLERS[sampler]
    if not fits(parse(text), solver):
        pytest.skip(f"{sampler} does not offer what {text} needs")
    quiet = solver(**{name: 0.0 for name in solver.options if name in NOISE_OPTIONS})
    out = sample(guided(parse(text), [0, 1]), start_of([0, 1]), noise.karras(3, 0.05, 3.0), quiet, VE, noise=refuse)
    assert torch.isfinite(out).all()


@every_example
def test_no_number_is_drawn_at_scale_1(text: str) -> None:
    """Without seeds a run cannot draw any."""
    made = at_scale(parse(text), 1.0)
    run = Guided({"main": MAIN, "weak": WEAK, **OTHERS}, made, conditions(LABELS), 4, seeds=None)
    out = sample(run, start_of([0, 1, 2, 3]), noise.karras(6, 0.05, 3.0), sampler_of(made), VE, Gaussian(range(4), stream=1))
    assert torch.equal(out, reference(NoGuidance(), sampler_of(made)).out)


# ---- images, from pure noise ----


class Images:
    """The exact denoiser of ``N(mean[label], std^2 I)`` on the flow path, at any level up to inf, in float32."""

    path = FLOW

    def __init__(self, std: float) -> None:
        self.variance, g = std**2, torch.Generator().manual_seed(3)
        self.mean = torch.randn(4, 3, 8, 8, generator=g) * torch.tensor([1.0, 1.0, 1.0, 0.3])[:, None, None, None]

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        label = condition["label"]
        weight = label if label.is_floating_point() else self.embed(label)
        mean = torch.einsum("bk,kchw->bchw", weight.to(x), self.mean)
        alpha, s = ((v.to(x))[:, None, None, None] for v in (1 / (1 + sigma), 1 / (1 + 1 / sigma)))
        return mean + alpha * self.variance / (alpha**2 * self.variance + s**2) * (x - alpha * mean)

    def embed(self, condition: Any) -> Any:
        if isinstance(condition, dict):
            return {**condition, "label": self.embed(condition["label"])}
        return condition if condition.is_floating_point() else torch.nn.functional.one_hot(condition % 4, 4).float()

    @contextmanager
    def perturbed(self, perturbation: Any) -> Iterator[None]:
        before, self.variance = self.variance, 2 * self.variance
        try:
            yield
        finally:
            self.variance = before


class Nearness:
    """``log p(label | x)`` of the images."""

    path = FLOW

    def __init__(self, images: Images) -> None:
        self.images = images

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        alpha = (1 / (1 + sigma)).to(x)[:, None, None, None, None]
        away = (x[:, None] - alpha * self.images.mean).square().mean((2, 3, 4))
        label = condition["label"] if isinstance(condition, dict) else condition
        return (-away).log_softmax(1).gather(1, label[:, None] % 4)[:, 0]


@every_example
def test_images_from_pure_noise(text: str) -> None:
    made, main, weak = parse(text), Images(0.3), Images(0.5)
    models = {"main": main, "weak": weak, "classifier": Nearness(main), "minority": Nearness(weak)}
    run = Guided(models, made, conditions(LABELS[:2]), 2, seeds=[0, 1])
    solver, sigmas = suitable("flow_euler", made), noise.uniform_t(4)
    out = sample(run, Gaussian([0, 1])(torch.empty(2, 3, 8, 8)), sigmas, solver, FLOW, Gaussian([0, 1], stream=1))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    steps = Guided(models, NoGuidance(), conditions(LABELS[:2]), 2)
    plain = sample(steps, Gaussian([0, 1])(torch.empty(2, 3, 8, 8)), sigmas, solver, FLOW, Gaussian([0, 1], stream=1))
    rows = run.trace.rows
    if any("+" in r["branches"] for r in rows) and all(r["branches"] for r in rows):  # it guides, and skips no step
        assert min(run.ledger.nfe) > min(steps.ledger.nfe)
        assert not torch.equal(out, plain)


# ---- compositions ----

LEAVES = (
    "CFG(3.0)",
    "APG(3.0, momentum=-0.5)",
    "ReuseDelta(3.0)",
    "Autoguidance(2.0)",
    "NoGuidance()",
    "CFG(0.0)",
    "LinearAG(2.0)",
)
AROUND = (
    "Interval({}, 0.2, 2.0)",
    "Interval({}, 1, 4, 'step')",
    "Adaptive({}, 0.99)",
    "Scheduled({}, 'sine')",
    "ZeroInit({})",
    "MomentumGuidance({}, 1.3)",
    "Sum({}, CFG(2.0))",
    "Piecewise(({}, CFG(2.0)), (1.0,))",
)


def compositions(count: int) -> list[str]:
    """Two and three deep, drawn from a fixed seed; those that a class refuses left out."""
    rng, found = random.Random(5), dict[str, None]()
    while len(found) < count:
        text = rng.choice(LEAVES)
        for _ in range(rng.choice((2, 3))):
            text = rng.choice(AROUND).format(text)
        try:
            parse(text)
        except ValueError:
            continue
        found[text] = None
    return list(found)


@pytest.mark.parametrize("text", compositions(40))
def test_compositions(text: str) -> None:
    """What holds of every guidance holds of guidances in one another."""
    made, order = parse(text), (2, 0, 3, 1)
    assert parse(repr(made)) == made
    run, permuted, plain = Run(made), Run(made, rows=order), reference(NoGuidance(), "heun")
    assert torch.isfinite(run.out).all()
    assert run.nfe == [a + b for a, b in zip(run.main.rows(4), run.weak.rows(4), strict=True)]
    assert sum(r["rows"] for r in run.guided.trace.rows) == sum(run.nfe)
    assert unequal(permuted.out, run.out[list(order)]) < 1e-9
    assert permuted.nfe == [run.nfe[i] for i in order]
    off = Run(at_scale(made, 1.0))
    assert torch.equal(off.out, plain.out)
    assert off.nfe == plain.nfe
    assert all(r["weight"] == 1 for r in off.guided.trace.rows)


# ---- new classes ----


@pytest.mark.usefixtures("own_registry")
def test_a_new_class_is_found_by_name() -> None:
    @dataclass(frozen=True)
    class Halfway(Guidance):
        """Between the two predictions."""

        share: float = 0.5
        examples: ClassVar[tuple[str, ...]] = ("Halfway(0.25)",)

        def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
            return COND, base.UNCOND

        def rule(self, info: StepInfo, predictions: Any, state: Any) -> tuple[Result, Any]:
            return Result(predictions["cond"].lerp(predictions["uncond"], self.share)), state

    assert registry()["Halfway"] is Halfway
    made = parse("Interval(Halfway(share=0.25), 0, 1)")
    assert made == Interval(Halfway(0.25), 0, 1)
    assert parse(repr(made)) == made
    assert unequal(Run(parse("Halfway(0.25)")).out, Run(CFG(0.75)).out) < 1e-9


@pytest.mark.usefixtures("own_registry")
def test_a_private_class_is_not_listed() -> None:
    @dataclass(frozen=True)
    class _Hidden(NoGuidance):
        pass

    assert not {"_Hidden", "_Combinator", "Guidance"} & set(registry())


@pytest.mark.usefixtures("own_registry")
def test_an_entry_point_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    class Point:
        def load(self) -> None:
            loads.append(1)

            class FromPlugin(NoGuidance):
                pass

    monkeypatch.setattr(guidance_package, "_plugins_loaded", False)
    monkeypatch.setattr(guidance_package, "entry_points", lambda group: [Point()] if group == "genkit.guidance" else [])
    assert "FromPlugin" in registry()
    assert type(parse("FromPlugin()")).__name__ == "FromPlugin"
    assert len(loads) == 1
