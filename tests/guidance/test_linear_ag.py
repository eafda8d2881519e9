"""LinearAG: its rule against a loop written out, exact recovery on Gaussian data, what is evaluated, fitting, files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import CFG, Adaptive, Guidance, Interval, NoGuidance, Scheduled, parse
from genkit.guidance.linear_ag import REUSE, LinearAG, estimate, fit_row
from genkit.noise import FLOW, VE, Path
from genkit.random import Gaussian
from genkit.samplers.diffusion import find_sampler, sample
from tests.toys import LABELS, MAIN, SHAPE, Run, conditions, step_info

ROWS = ((), REUSE, (0.9, -0.7, 0.2, 0.8, -0.3), (), (1.1, -0.4, 0.35), (0.8,))


class Pipe:
    """A pipeline in the least sense that fitting asks for: float64 runs of a denoiser whose label 0 is a class, 1 none."""

    def __init__(self, denoiser: Any, shape: tuple[int, ...], sigmas: Any = None, labels: tuple[int, int] = (0, 1)) -> None:
        self.denoiser, self.shape, self.labels = denoiser, shape, labels
        self.sigmas = sigmas or (lambda steps: noise.karras(steps, 0.05, 5.0))

    def __call__(
        self, classes: int, seeds: range, guidance: Guidance, *, sampler: str, steps: int, grid: Any = None, trace: Any = "basic"
    ) -> Any:
        solver, path = find_sampler(sampler), self.denoiser.path
        cond = torch.full((len(seeds),), classes)
        self.run = Guided(self.denoiser, guidance, {"cond": cond, "uncond": torch.full_like(cond, self.labels[1])}, len(seeds))
        sigmas = self.sigmas(steps)
        x = Gaussian(list(seeds))(torch.empty(len(seeds), *self.shape, dtype=torch.float64)) * path(float(sigmas[0]))[1]
        self.out = sample(self.run, x, sigmas, solver, path, noise=Gaussian(list(seeds), stream=1))
        return SimpleNamespace(latents=self.out, nfe=self.run.ledger.nfe)


class Diagonal:
    """The exact denoiser of N(0, diag(variance[label]))."""

    def __init__(self, variance: list[list[float]], path: Path = VE) -> None:
        self.variance, self.path = torch.tensor(variance, dtype=torch.float64), path

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        v, s = self.variance[label], sigma[:, None]
        alpha = 1.0 if self.path is VE else 1 / (1 + s)
        return torch.where(s.isinf(), 0.0, v / (v + s**2) * x / alpha) if bool(s.isinf().any()) else v / (v + s**2) * x / alpha


MIXTURE = Pipe(MAIN, SHAPE, labels=(0, -1))
THREE = [[0.2, 0.9, 2.5], [1.3, 0.4, 0.7]]


# ---- the rule ----


@pytest.mark.parametrize("rows", [(), ROWS], ids=["reuse", "rows"])
def test_is_the_loop_written_out(rows: Any) -> None:
    """Euler on the ve path, predictions as eps, all of the history kept."""
    made, steps = LinearAG(3.0, rows), 6
    sigmas = noise.karras(steps, 0.05, 3.0).tolist()
    x = 3.0 * Gaussian(range(4))(torch.empty(4, *SHAPE, dtype=torch.float64))
    labels, cond, uncond = conditions(LABELS), [], []
    used = rows or ((), REUSE, (), REUSE, REUSE, REUSE)
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        level = torch.full((4,), sigma, dtype=torch.float64)
        c, u = ((x - MAIN(x, level, labels[name])) / sigma for name in ("cond", "uncond"))
        if used[i]:
            h = len(used[i]) // 2
            now = [c, *cond[::-1][:h]]
            u = sum(b * e for b, e in zip(used[i], now + uncond[::-1][:h], strict=True))
        cond.append(c)
        uncond.append(u)
        x = x + (after - sigma) * (u + 3.0 * (c - u))
    torch.testing.assert_close(Run(made, "euler").out, x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "heun(churn=20)"])
def test_always_evaluating_is_cfg(sampler: str) -> None:
    run, cfg = Run(LinearAG(3.0, every=1, until=1.0), sampler), Run(CFG(3.0), sampler)
    assert torch.equal(run.out, cfg.out)
    assert run.nfe == cfg.nfe


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_reuse_rows_are_the_default(sampler: str) -> None:
    rows = tuple(() if i in (0, 2) else REUSE for i in range(6))
    made = LinearAG(3.0, rows, rows[:5] if sampler == "heun" else ())
    assert torch.equal(Run(made, sampler).out, Run(LinearAG(3.0), sampler).out)


def test_the_second_evaluation_reads_the_first() -> None:
    made, info = LinearAG(3.0), step_info(torch.zeros(1, 2, dtype=torch.float64), index=1, total=4, sigma=2.0)

    def at(eps: float, info: Any) -> Tensor:
        return noise.to_x0(torch.full((1, 2), eps, dtype=torch.float64), info.x, info.alpha, info.s, "eps")

    start = info._replace(index=0)
    _, state = made.combine(start, {"cond": at(5.0, start), "uncond": at(3.0, start)}, made.init(1))
    second = start._replace(stage="second", s=1.0)
    assert [b.name for b in made.plan(second, state)] == ["cond", "uncond"]
    _, state = made.combine(second, {"cond": at(4.0, second), "uncond": at(1.0, second)}, state)
    assert [b.name for b in made.plan(info, state)] == ["cond"]
    result, state = made.combine(info, {"cond": at(2.0, info)}, state)  # eps_u = 2 - 3
    torch.testing.assert_close(result.denoised, at(-1.0 + 3.0 * 3.0, info))
    assert (state.step, state.second, float(state.uncond[0][0, 0])) == (1, False, -1.0)


# ---- what is evaluated ----


@pytest.mark.parametrize(
    ("options", "sampler", "steps", "evaluated"),
    [
        ({}, "euler", 6, [0, 2]),
        ({}, "euler", 7, [0, 2]),
        ({}, "euler", 9, [0, 2, 4]),
        ({"every": 3, "until": 1.0}, "euler", 8, [0, 3, 6]),
        ({"every": 1, "until": 0.25}, "dpmpp_2m", 8, [0, 1]),
        ({"until": 0.0}, "euler", 5, [0]),
        ({}, "heun", 6, [0, 0, 2, 2]),
        ({"every": 5, "until": 1.0}, "heun", 6, [0, 0, 5]),
    ],
)
def test_steps_that_are_evaluated(options: Any, sampler: str, steps: int, evaluated: list[int]) -> None:
    run = Run(LinearAG(3.0, **options), sampler, steps=steps)
    rows = run.guided.trace.rows
    assert [r["step"] for r in rows if r["branches"] == "cond+uncond"] == evaluated
    assert run.nfe == [len(rows) + len(evaluated)] * 4
    assert {r["weight"] for r in rows} == {3.0}  # guided everywhere, also where one branch runs


def test_after_a_gap_it_evaluates_anew() -> None:
    run = Run(Scheduled(LinearAG(3.0, until=0.0), "v"), "euler", steps=5)
    assert run.guided.trace.column("branches") == ["cond+uncond", "cond", "cond", "cond+uncond", "cond"]
    late = Run(Interval(LinearAG(3.0, ROWS), 3, 5, "step"), "euler")
    assert late.guided.trace.column("branches") == ["cond"] * 3 + ["cond+uncond", "cond", "cond"]


def test_pure_noise_is_evaluated_and_not_kept() -> None:
    pipe = Pipe(Diagonal(THREE, FLOW), (3,), sigmas=lambda n: noise.uniform_t(n))
    out = pipe(0, range(4), LinearAG(3.0), sampler="flow_euler", steps=8)
    assert torch.isfinite(out.latents).all()
    assert pipe.run.trace.column("branches") == ["cond+uncond"] * 3 + ["cond"] * 5
    made = LinearAG.fit(pipe, 0, range(8), 3.0, sampler="flow_euler", steps=8)
    assert [bool(row) for row in made.coefficients] == [False] * 3 + [True] * 5


def test_samples_of_an_adaptive_batch_leave_one_by_one() -> None:
    made = Adaptive(LinearAG(3.0), 0.99)
    run = Run(made, "euler")
    assert len(set(run.nfe)) > 1
    for i in range(4):
        alone = Run(made, "euler", rows=(i,))
        torch.testing.assert_close(alone.out[0], run.out[i], rtol=0, atol=1e-9)
        assert alone.nfe == [run.nfe[i]]


@pytest.mark.parametrize(
    ("made", "sampler", "steps", "message"),
    [
        (LinearAG(3.0, ROWS), "euler", 7, "fitted for 6 steps, but this run has 7"),
        (LinearAG(3.0, ROWS), "heun", 6, "one evaluation a step"),
        (LinearAG(3.0, ROWS, ROWS[:5]), "euler", 6, "two evaluations a step"),
    ],
)
def test_coefficients_of_another_run_are_refused(made: LinearAG, sampler: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(made, sampler, steps=steps)


# ---- fitting ----


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_coefficients_of_a_gaussian_are_the_closed_form(sampler: str) -> None:
    """eps = sigma x / (v + sigma^2), so eps_u is (v_c + sigma^2) / (v_u + sigma^2) times eps_c."""
    pipe = Pipe(Diagonal([[0.3] * 3, [1.7] * 3]), (3,))
    made = LinearAG.fit(pipe, 0, range(4), 2.0, sampler=sampler, steps=6, history=0, ridge=0.0, digits=17)
    squares = [s**2 for s in noise.karras(6, 0.05, 5.0).tolist()]
    want = [(0.3 + s) / (1.7 + s) for s in squares]
    for rows, closed in ((made.coefficients, want), (made.second, want[1:])):
        for i, row in enumerate(rows):
            assert row == (() if i in (0, 2) else pytest.approx((closed[i],), rel=1e-10))
    assert len(made.second) == (5 if sampler == "heun" else 0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "flow_euler"])
@pytest.mark.parametrize("follow", ["own", "cfg"])
def test_three_variances_are_recovered_from_one_earlier_evaluation(sampler: str, follow: str) -> None:
    """eps_c now, eps_c then and eps_u then are three functions of the variance: enough for any third of three values."""
    pipe = Pipe(Diagonal(THREE, FLOW if sampler == "flow_euler" else VE), (3,))
    options: Any = {"sampler": sampler, "steps": 7}
    made = LinearAG.fit(pipe, 0, range(8), 3.0, history=1, ridge=0.0, digits=17, follow=follow, **options)
    cfg = pipe(0, range(100, 120), CFG(3.0), **options)
    fitted, reuse = (pipe(0, range(100, 120), g, **options) for g in (made, LinearAG(3.0)))
    assert (fitted.latents - cfg.latents).abs().max() < 1e-7
    assert (reuse.latents - cfg.latents).abs().max() > 1e-2
    assert fitted.nfe == reuse.nfe
    assert max(fitted.nfe) < min(cfg.nfe)


def test_a_row_with_feedback_is_recovered() -> None:
    """A recursion of depth 2, whose own past values are the history."""
    g = torch.Generator().manual_seed(0)
    row = (0.7, -0.4, 0.1, 0.9, -0.25)
    cond = list(torch.randn(3, 50, generator=g, dtype=torch.float64))
    uncond = list(torch.randn(2, 50, generator=g, dtype=torch.float64))
    target = 0.7 * cond[0] - 0.4 * cond[1] + 0.1 * cond[2] + 0.9 * uncond[0] - 0.25 * uncond[1]
    torch.testing.assert_close(estimate(row, cond, uncond), target)
    assert fit_row(cond, uncond, target) == pytest.approx(row, abs=1e-12)
    assert fit_row(cond, uncond, target, ridge=1e9) == pytest.approx((1.0, -1.0, 0.0, 1.0, 0.0), abs=1e-6)
    parallel = fit_row(
        [cond[0], 2 * cond[0]], [cond[0]], 3 * cond[0]
    )  # REUSE gives 0: the nearest that gives 3 adds along (1, 2, 1)
    assert parallel == pytest.approx((1.0 + 0.5, -1.0 + 1.0, 1.0 + 0.5), abs=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_run_has_the_history_it_was_fitted_on(sampler: str) -> None:
    options: Any = {"sampler": sampler, "steps": 6}
    made = LinearAG.fit(MIXTURE, 0, range(12), 3.0, **options)
    fitting = MIXTURE.out
    torch.testing.assert_close(MIXTURE(0, range(12), made, **options).latents, fitting, rtol=0, atol=1e-9)
    LinearAG.fit(MIXTURE, 0, range(12), 3.0, follow="cfg", **options)
    assert torch.equal(MIXTURE.out, MIXTURE(0, range(12), CFG(3.0), **options).latents)


@pytest.mark.parametrize(("sampler", "nfe"), [("euler", 20), ("heun", 39)])
def test_fitting_is_better_than_reuse_at_equal_cost(sampler: str, nfe: int) -> None:
    options: Any = {"sampler": sampler, "steps": 16}
    made = LinearAG.fit(MIXTURE, 0, range(1000, 1256), 3.0, **options)
    cfg = MIXTURE(0, range(200), CFG(3.0), **options).latents
    runs = [MIXTURE(0, range(200), g, **options) for g in (made, LinearAG(3.0), NoGuidance())]
    fitted, reuse, none = (float((r.latents - cfg).square().mean()) for r in runs)
    assert runs[0].nfe == runs[1].nfe == [nfe] * 200
    assert fitted < 0.75 * reuse < 0.1 * none


def test_fit_refuses_restarts() -> None:
    """They come by a step more than once, so a row would not belong to one evaluation."""
    with pytest.raises(ValueError, match="a sampler without restarts"):
        LinearAG.fit(MIXTURE, 0, range(4), 3.0, sampler="restart(low=0.3, high=2.0, times=1)", steps=8)


def test_fit_refuses() -> None:
    def chunked(classes: int, seeds: range, guidance: Guidance, **options: Any) -> None:
        for part in (seeds[:2], seeds[2:]):
            MIXTURE(classes, part, guidance, **options)

    for pipe, options, message in (
        (chunked, {}, "several batches"),
        (MIXTURE, {"scale": 1.0}, "scale=1"),
        (MIXTURE, {"follow": "both"}, "follow='both'"),
        (MIXTURE, {"history": -1}, "history=-1"),
        (MIXTURE, {"digits": 0}, "digits=0"),
        (MIXTURE, {"ridge": -1.0}, "ridge=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearAG.fit(pipe, 0, range(4), **{"scale": 3.0, "steps": 4, **options})


# ---- text and files ----


def test_fitted_coefficients_fit_into_an_expression() -> None:
    """History 2, 6 digits: 20 first-order steps stay below the parser's 2000 characters."""
    made = LinearAG.fit(MIXTURE, 0, range(12), 3.0, sampler="euler", steps=20)
    assert parse(repr(made)) == made
    assert hash(parse(repr(made))) == hash(made)
    assert repr(parse(repr(made))) == repr(made)
    assert LinearAG(3, [[], [1, -1, 1]]) == LinearAG(3.0, ((), (1.0, -1.0, 1.0)))  # type: ignore[arg-type,list-item]


def test_save_and_load(tmp_path: File) -> None:
    file = tmp_path / "coefficients.json"
    made = LinearAG.fit(MIXTURE, 0, range(12), 3.0, sampler="heun", steps=5, digits=17)
    made.save(file, sampler="heun", grid="karras", model="toy")
    assert LinearAG.load(file) == made
    other = LinearAG(2.0, ROWS)
    other.save(file, sampler="euler", grid="edm")
    assert LinearAG.load(file, scale=3.0) == made
    assert LinearAG.load(file, sampler="euler", steps=6, scale=2.0, grid="edm") == other
    replace(other, coefficients=ROWS[::-1]).save(file, sampler="euler", grid="edm")
    assert LinearAG.load(file, steps=6).coefficients == ROWS[::-1]
    assert [e["about"] for e in json.loads(file.read_text())["entries"]] == [{"model": "toy"}, {}]
    with pytest.raises(ValueError, match=r"2 entries fit .*sampler='heun', steps=5, scale=3\.0, grid='karras'; sampler='euler'"):
        LinearAG.load(file)
    with pytest.raises(ValueError, match="no entry fits \\(steps=7\\)"):
        LinearAG.load(file, steps=7)
    with pytest.raises(ValueError, match="nothing to save"):
        LinearAG(3.0).save(file, sampler="euler", grid="edm")
    assert not list(tmp_path.glob("*.tmp"))


ENTRY = {"sampler": "euler", "steps": 2, "scale": 3.0, "grid": "edm", "coefficients": [[], [1]], "second": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a file of format"),
        ({"format": "another", "entries": []}, "not a file of format"),
        ({"format": "genkit-linear-ag-1", "entries": [{"sampler": "euler"}]}, "entry 0 lacks"),
        ({"format": "genkit-linear-ag-1", "entries": [{**ENTRY, "steps": 3}]}, "2 rows of coefficients for 3 steps"),
        ({"format": "genkit-linear-ag-1", "entries": [{**ENTRY, "coefficients": [[], ["1"]]}]}, "coefficients\\[1\\]"),
        ({"format": "genkit-linear-ag-1", "entries": [{**ENTRY, "scale": None}]}, "scale=None"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: File, content: Any, message: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LinearAG.load(file)


def test_text_never_reads_a_file(tmp_path: File) -> None:
    file = tmp_path / "coefficients.json"
    LinearAG(2.0, ROWS).save(file, sampler="euler", grid="edm")
    for text in (f"LinearAG.load('{file}')", f"LinearAG(2.0, '{file}')", f"LinearAG(2.0, coefficients='{file}')"):
        with pytest.raises(ValueError, match="guidance"):
            parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        (math.nan,),
        (3.0, 1.0),
        (3.0, (1.0, 2.0)),
        (3.0, ((), (1.0, 2.0))),
        (3.0, ((), (math.inf,))),
        (3.0, ((), (True,))),
        (3.0, (), ((), (1.0,))),
        (3.0, (), (), 0),
        (3.0, (), (), 1.5),
        (3.0, (), (), 2, 1.1),
    ],
    ids=repr,
)
def test_bad_arguments(arguments: Any) -> None:
    with pytest.raises(ValueError, match="LinearAG: "):
        LinearAG(*arguments)
