"""Laws of guidance on logits, for every registered guidance that means something there."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import APG, CFG, COND, Guidance, Interval, NoGuidance, Scheduled, parse, registry
from genkit.guidance.base import Branch, StepInfo
from genkit.samplers.autoregressive.guided import GuidedLogits, centre, check_logits
from tests.toys import at_scale
from tests.toys_ar import LABELS, Sums, conditions

ALL = [text for cls in registry().values() for text in cls.examples]


def fits(text: str) -> bool:
    try:
        check_logits(parse(text))
    except ValueError:
        return False
    return True


VALID = [text for text in ALL if fits(text)] + [
    "Interval(Sum(CFG(3.0), PAG(2.0)), 3, 8, 'step')",
    "Scheduled(CFG(4.0), 'linear', preserve_mean=False)",
    "Interval(Autoguidance(2.0), 0.5, 1, 'fraction')",
    "Adaptive(CFG(3.0), 0.85)",
]
every_valid = pytest.mark.parametrize("text", VALID)
GIVEN = torch.randint(7, (4, 12), generator=torch.Generator().manual_seed(5))


class Run:
    """Logits along given tokens (4 rows of 12), one by one, with every network's calls on record."""

    def __init__(self, guidance: Guidance, rows: tuple[int, ...] = (0, 1, 2, 3), trace: Any = "full", chunk: int = 1) -> None:
        index = list(rows)
        self.main, self.weak = Sums(), Sums(seed=1, sharpness=0.5)
        models = {"main": self.main, "weak": self.weak}
        self.guided = GuidedLogits(models, guidance, conditions(LABELS[index]), len(rows), trace=trace, seeds=index)
        fed, given = torch.zeros(len(rows), 1, dtype=torch.long), GIVEN[index]
        out = []
        for i in range(0, 12, chunk):
            out.append(self.guided.logits(fed, i, 12))
            fed = given[:, i : i + chunk]
        self.out = torch.cat(out, 1)

    @property
    def nfe(self) -> list[int]:
        return self.guided.ledger.nfe


@lru_cache(maxsize=256)
def reference(text: str) -> Run:
    """A run on all rows, made once: read it only."""
    return Run(parse(text))


def unequal(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def teacher(network: Sums, label: Tensor) -> Tensor:
    return centre(network.full(GIVEN[:, :11], label))


# ---- closed forms ----


def test_cfg_is_the_formula_on_teacher_forced_logits() -> None:
    cond, uncond = (teacher(Sums(), label) for label in (conditions(LABELS)["cond"], conditions(LABELS)["uncond"]))
    run = Run(CFG(3.0))
    assert unequal(run.out, cond + 2 * (cond - uncond)) < 1e-12
    assert run.nfe == [24] * 4
    assert run.guided.ledger.calls == 12  # both branches in one pass
    assert all(labels == [0, 1, 2, 0, 3, 3, 3, 3] for _, _, labels in run.main.calls)
    assert set(run.guided.hidden) == {"cond", "uncond"}


def test_cfg_in_probabilities() -> None:
    """p ~ p_c^w p_u^(1 - w)."""
    run = Run(CFG(2.5))
    cond, uncond = teacher(Sums(), LABELS).softmax(-1), teacher(Sums(), torch.full((4,), 3)).softmax(-1)
    wanted = cond**2.5 * uncond**-1.5
    assert unequal(run.out.softmax(-1), wanted / wanted.sum(-1, keepdim=True)) < 1e-12


def test_vars_ramp_is_a_schedule() -> None:
    cond, uncond = teacher(Sums(), LABELS), teacher(Sums(), torch.full((4,), 3))
    run = Run(Scheduled(CFG(1 + 1.5), "linear", preserve_mean=False))
    t = 1.5 * torch.arange(12, dtype=torch.float64)[:, None] / 11
    assert unequal(run.out, (1 + t) * cond - t * uncond) < 1e-12


def test_autoguidance_uses_the_other_network() -> None:
    main, weak = teacher(Sums(), LABELS), teacher(Sums(seed=1, sharpness=0.5), LABELS)
    run = Run(parse("Autoguidance(2.0)"))
    assert unequal(run.out, 2 * main - weak) < 1e-12
    assert len(run.weak.calls) == 12


def test_apg_at_eta_1_is_cfg() -> None:
    assert unequal(Run(APG(3.0, eta=1.0)).out, Run(CFG(3.0)).out) < 1e-12


# ---- laws ----


@every_valid
def test_scale_1_is_the_conditional_prediction_alone(text: str) -> None:
    run = Run(at_scale(parse(text), 1.0))
    assert torch.equal(run.out, reference("NoGuidance()").out)
    assert run.nfe == [12] * 4
    assert not run.weak.calls


@every_valid
def test_ledger_and_trace_are_what_the_networks_saw(text: str) -> None:
    run = reference(text)
    seen = sum(n * len(labels) for net in (run.main, run.weak) for _, n, labels in net.calls)
    assert sum(run.nfe) == seen
    assert sum(run.guided.trace.column("rows")) == seen
    assert run.guided.ledger.calls == len(run.main.calls) + len(run.weak.calls)
    assert len(run.guided.trace) == 12


class _Always(Interval):
    """An interval that plans what is inside also where it is closed, and does not use it."""

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        branches = self.inner.plan(info, state)
        return branches if "cond" in {b.name for b in branches} else (COND, *branches)


@every_valid
@pytest.mark.parametrize(("low", "high"), [(0, 4), (4, 20)])
def test_a_branch_that_was_skipped_is_as_if_it_never_was(text: str, low: int, high: int) -> None:
    inner = parse(text)
    info = StepInfo(5, 12, 5 / 11, "step", math.nan, math.nan, 1.0, 0.0, torch.zeros(4, 1, 1))
    if any(b.transform for b in inner.plan(info, inner.init(4))):
        pytest.skip("its condition is another in every step")
    run, always = Run(Interval(inner, low, high, "step")), Run(_Always(inner, low, high, "step"))
    assert unequal(run.out, always.out) < 1e-12
    assert sum(run.nfe) <= sum(always.nfe)
    outside = [i for i in range(12) if not low <= i <= high]
    assert unequal(run.out[:, outside], reference("NoGuidance()").out[:, outside]) < 1e-12


def test_what_skipping_saves() -> None:
    early, late = Run(Interval(CFG(3.0), 0, 4, "step")), Run(Interval(CFG(3.0), 8, 12, "step"))
    assert early.nfe == [12 + 5] * 4  # cond always, uncond in 5 steps
    assert early.guided.ledger.calls == 12
    assert late.nfe == [12 + 12] * 4  # the 8 positions missed are fed when it opens ...
    assert late.guided.ledger.calls == 13  # ... in one pass
    assert (0, 8, [3, 3, 3, 3]) in late.main.calls
    assert Run(CFG(0.0)).nfe == [12] * 4


@every_valid
def test_permuting_the_batch_permutes_the_result(text: str) -> None:
    order = (2, 0, 3, 1)
    run, permuted = reference(text), Run(parse(text), order)
    assert unequal(permuted.out, run.out[list(order)]) < 1e-12
    assert permuted.nfe == [run.nfe[i] for i in order]


@every_valid
def test_a_row_alone_is_the_row_in_its_batch(text: str) -> None:
    run = reference(text)
    for i in (1, 3):
        alone = Run(parse(text), (i,))
        assert unequal(alone.out[0], run.out[i]) < 1e-12
        assert alone.nfe == [run.nfe[i]]


def test_samples_leave_adaptive_one_by_one() -> None:
    assert len(set(Run(parse("Adaptive(CFG(3.0), 0.85)")).nfe)) > 1


@every_valid
def test_runs_leave_the_global_generator_alone(text: str) -> None:
    before = torch.get_rng_state()
    Run(parse(text), trace="none")
    assert torch.equal(torch.get_rng_state(), before)


# ---- refusals ----


def family(guidance: Guidance) -> list[Guidance]:
    return [guidance] + [one for part in guidance.parts for one in family(part)]


@pytest.mark.parametrize("text", [text for text in ALL if not fits(text)])
def test_what_means_nothing_on_logits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="which logits do not have; use CFG") as error:
        GuidedLogits(Sums(), parse(text), conditions(LABELS), 4)
    assert any(f"guidance={part!r} " in str(error.value) for part in family(parse(text)))


def test_what_is_valid_and_what_is_not() -> None:
    names = {type(parse(text)).__name__ for text in VALID}
    assert {"CFG", "Autoguidance", "PAG", "SEG", "SLG", "APG", "Interval", "Scheduled", "Adaptive", "Sum", "Piecewise"} <= names
    diffusion = {"CFGPP", "CFGZeroStar", "DynamicThresholding", "Rescaled", "TCFG", "RAAG", "FDG", "RectifiedCFGPP", "ZeroInit"}
    assert not diffusion & names


def test_an_interval_of_noise_levels_is_refused_when_built_and_when_asked() -> None:
    with pytest.raises(ValueError, match="unit='sigma'"):
        GuidedLogits(Sums(), Scheduled(Interval(CFG(3.0), 0.3, 5.0)), conditions(LABELS), 4)
    info = StepInfo(0, 1, 0.0, "step", math.nan, math.nan, 1.0, 0.0, torch.zeros(4, 1, 1))
    with pytest.raises(ValueError, match="unit='step'"):
        Interval(CFG(3.0), 0.3, 5.0).plan(info, None)


def test_momentum_over_steps_of_different_size_is_refused() -> None:
    with pytest.raises(ValueError, match="turn its momentum off"):
        Run(APG(4.0, momentum=-0.5), chunk=3)


def test_missing_things_are_named() -> None:
    with pytest.raises(ValueError, match="'uncond' branch"):
        GuidedLogits(Sums(), CFG(2.0), {"cond": LABELS}, 4).logits(torch.zeros(4, 1, dtype=torch.long), 0, 1)
    with pytest.raises(ValueError, match=r"inputs has 2 rows.*batch=4"):
        GuidedLogits(Sums(), NoGuidance(), {"cond": LABELS}, 4).logits(torch.zeros(2, 1, dtype=torch.long), 0, 1)
    with pytest.raises(ValueError, match="length=3 is too short for 4 positions"):
        GuidedLogits(Sums(), NoGuidance(), {"cond": LABELS}, 4, length=3).logits(torch.zeros(4, 4, dtype=torch.long), 0, 1)


# ---- trees ----


def tree_run(guidance: Guidance) -> GuidedLogits:
    """Two positions, then a tree of 5 nodes (0 with children 1, 2; 3 under 2; 4 under 1) of which rows keep different paths."""
    run = GuidedLogits(Sums(), guidance, conditions(LABELS[:2]), 2, length=13)
    run.logits(torch.tensor([[0, 3], [0, 1]]), 0, 12, tail=1)
    parents = {1: 0, 2: 0, 3: 2, 4: 1}
    tree = torch.eye(5, dtype=torch.bool)
    for child, parent in parents.items():
        tree[child] |= tree[parent]
    mask = torch.cat([torch.ones(5, 2, dtype=torch.bool), tree], 1)
    tokens = torch.tensor([[2, 5, 1, 6, 4], [3, 0, 4, 2, 2]])
    run.logits(tokens, 2, 12, mask=mask, positions=torch.tensor([2, 3, 3, 4, 4]))
    run.keep(torch.tensor([[0, 2, 3], [0, 1, -1]]))
    assert run.lengths.tolist() == [5, 4]
    return run


@pytest.mark.parametrize("text", ["CFG(3.0)", "Interval(CFG(3.0), 2, 3, 'step')", "Interval(CFG(3.0), 3, 9, 'step')"])
def test_after_a_tree_only_the_path_counts(text: str) -> None:
    run = tree_run(parse(text))
    mask = torch.arange(6)[None, None, None] <= run.lengths[:, None, None, None]
    found = run.logits(torch.tensor([[1], [6]]), 3, 12, mask=mask)
    for row, tokens in enumerate(([3, 2, 1, 6, 1], [1, 3, 0, 6])):
        given, label = torch.tensor([tokens]), LABELS[row : row + 1]
        cond, uncond = (centre(Sums().full(given, c))[:, -1] for c in (label, torch.tensor([3])))
        assert unequal(found[row], cond + 2 * (cond - uncond)) < 1e-12


def test_rewinding_forgets() -> None:
    plain, run = Run(CFG(3.0)), GuidedLogits(Sums(), CFG(3.0), conditions(LABELS), 4)
    fed = torch.cat([torch.zeros(4, 1, dtype=torch.long), GIVEN], 1)
    run.logits(fed[:, :4], 0, 12)
    run.logits(6 - fed[:, 4:7], 4, 12)
    run.rewind(4)
    assert unequal(run.logits(fed[:, 4:5], 4, 12), plain.out[:, 4:5]) < 1e-12


def test_predictions_made_elsewhere_are_guided_alike() -> None:
    run = Run(CFG(3.0))
    cond, uncond = teacher(Sums(), LABELS), teacher(Sums(), torch.full((4,), 3))
    assert unequal(run.guided.combined({"cond": cond + 5, "uncond": uncond}, 3, 12), run.out) < 1e-12
