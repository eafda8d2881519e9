"""Sweeps and tuning: what is tried, what is left out, and that a stopped search goes on as if it had not been."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from genkit_eval import command
from genkit_eval.cli import invoke
from genkit_eval.errors import InputError
from genkit_eval.extractors import EXTRACTORS, Extractor
from genkit_eval.references import read_contents, write_safetensors
from genkit_eval.search.sweep import objectives_of
from genkit_eval.search.templates import expand, fill, names_of, values_of
from genkit_eval.search.tune import Budget, distribution_of, shown
from genkit_eval.selection import metrics_of

from genkit.guidance import CFG, Interval
from tests.eval.standins import FakePipeline

INTERVAL = "Interval(CFG({w}), {lo}, {hi})"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, extractor: Extractor, reference_file: Path, plain_plots: None) -> FakePipeline:
    """The stand-ins behind the real commands."""
    pipe = FakePipeline()
    own = Extractor(extractor.name, extractor.label, extractor.sha256, extractor.resize, extractor.features, reference_file)
    monkeypatch.setitem(EXTRACTORS, "builtin/cifar10", lambda options: own)
    monkeypatch.setattr(command, "load_pipeline", lambda model, device: pipe)
    return pipe


def args(name: str, out: Path, *more: str) -> list[str]:
    return [name, "--out", str(out), "--num-samples", "20", "--steps", "3", "--block-size", "10", "--bootstrap", "10", *more]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def labels(out: Path) -> list[str]:
    return [entry["label"] for entry in results(out)["guidances"]]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1:4:0.5", ["1", "1.5", "2", "2.5", "3", "3.5", "4"]),
        ("0.1:0.5:0.1", ["0.1", "0.2", "0.3", "0.4", "0.5"]),
        ("1:2:0.3", ["1", "1.3", "1.6", "1.9"]),
        ("3:1:-1", ["3", "2", "1"]),
        ("10:30:10", ["10", "20", "30"]),
        ("0.1, 0.28,0.1", ["0.1", "0.28"]),
        ("linear,cosine", ["linear", "cosine"]),
    ],
)
def test_values_are_exact_decimals_with_both_ends(text: str, values: list[str]) -> None:
    assert values_of(text, "--grid") == values


@pytest.mark.parametrize("text", ["1:4", "1:4:0", "4:1:1", "a:b:c", "1,,2", "0:1:1e-9", "nan:1:1", "1:inf:1", "1:2:3:4"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--grid"):
        values_of(text, "--grid")


def test_a_template_is_filled_once_for_each_combination_that_works() -> None:
    found = expand([INTERVAL, "CFG({w})", "CFG(2.0)"], ["w=2,3", "lo=0.1,9", "hi=5.42"])
    texts = ["Interval(CFG(2), 0.1, 5.42)", "Interval(CFG(3), 0.1, 5.42)", "CFG(2)", "CFG(3)"]
    assert [text for text, _ in found.guidances] == texts
    assert found.guidances[0][1] == Interval(CFG(2.0), 0.1, 5.42)
    assert [text for text, _ in found.refused] == ["Interval(CFG(2), 9, 5.42)", "Interval(CFG(3), 9, 5.42)"]
    assert found.merged == 1
    assert "4 guidances; 2 combinations left out" in found.summary()
    assert "1 merged" in found.summary()


def test_braces_are_names_and_nothing_else() -> None:
    assert names_of("Sum(CFG({a}), APG({b}), CFG({a}))") == ("a", "b")
    assert fill("CFG( {a} )", {"a": "3"}) == "CFG( 3 )"
    with pytest.raises(InputError, match="not allowed"):
        expand(["CFG({a.__class__})"], [])


@pytest.mark.parametrize(
    ("templates", "grids", "message"),
    [
        (["CFG({w})"], [], r"no values for \{w\}"),
        (["CFG(3.0)"], ["w=1,2"], r"no --guidance has a place \{w\}"),
        (["CFG({w})"], ["w"], "name=values works"),
        (["CFG({w})"], ["w=1", "w=2"], "given twice"),
        (["CGF({w})"], ["w=1,2"], "did you mean"),
        (["Interval(CFG(2), {lo}, 1)"], ["lo=2,3"], "low=2 is above high=1"),
        (["Interval(CFG({w}), {lo}, 9)"], ["w=1:9999:1", "lo=0:8:0.001"], "at most 10,000"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(templates: list[str], grids: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand(templates, grids)


def test_a_sweep_is_a_run_that_ends_with_its_front(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--guidance", INTERVAL, "--guidance", "none", "--grid", "w=2:3:0.5", "--grid", "lo=0.1,9", "--grid", "hi=5.42"]
    assert invoke(args("sweep", tmp_path, *more)) == 0
    out, err = capsys.readouterr()
    assert "4 guidances; 3 combinations left out, such as Interval(CFG(2), 9, 5.42)" in err
    texts = [f"Interval(CFG({w}), 0.1, 5.42)" for w in ("2", "2.5", "3")]
    assert labels(tmp_path) == [*texts, "none"]
    assert re.search(r"Pareto front \(FD-TINY, Recall, NFE\): \d of 4\n", out)
    assert len({(seed, label) for _, seed, label in tiny.asked}) == 20
    made = len(tiny.asked)
    assert made == 4 * 20
    # A further scale makes its own images alone; the rest stays in the folder.
    assert invoke(args("sweep", tmp_path, "--guidance", "CFG({w})", "--grid", "w=7,8", "--objective", "nfe")) == 0
    assert labels(tmp_path) == [*texts, "none", "CFG(7)", "CFG(8)"]
    assert len(tiny.asked) == made + 2 * 20
    assert "Pareto front (NFE): 6 of 6" in capsys.readouterr().out


class Picky(FakePipeline):
    """Refuses guidances of scale 3, and diverges at none."""

    def __call__(self, classes: Any, seeds: Any, guidance: Any, **more: Any) -> Any:
        if guidance == CFG(3.0):
            raise ValueError("scale: 3.0 is too much for this model")
        return super().__call__(classes, seeds, guidance, **more)


def test_what_the_model_refuses_is_left_out_and_the_rest_made(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_pipeline", lambda model, device: Picky())
    assert invoke(args("sweep", tmp_path, "--guidance", "CFG({w})", "--grid", "w=2:4:1")) == 0
    assert labels(tmp_path) == ["CFG(2)", "CFG(4)"]
    assert "left out: --guidance 'CFG(3)': scale: 3.0 is too much" in capsys.readouterr().out
    assert invoke(args("sweep", tmp_path / "x", "--guidance", "CFG({w})", "--grid", "w=3,3.0")) == 2


def test_objectives_must_have_a_better_side(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("saturation", "nope"):
        more = ["--guidance", "CFG({w})", "--grid", "w=2,3", "--objective", name]
        assert invoke(args("sweep", tmp_path, *more)) == 2
        assert f"--objective: got '{name}'; one of " in capsys.readouterr().err
    assert tiny.asked == []


TUNE = ["--guidance", INTERVAL, "--range", "w=1:8", "--range", "lo=0.01:1:log", "--range", "hi=2,5.42", "--budget", "280 images"]


def trials(out: Path) -> list[dict[str, Any]]:
    """Parameters and values of the finished trials, as the storage has them."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(out / "tune.journal")))
    study = optuna.load_study(study_name="tune", storage=storage)
    return [{"params": t.params, "values": t.values, "state": t.state.name} for t in study.trials]


def test_tuning_spends_its_budget_and_keeps_every_trial(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(args("tune", tmp_path, *TUNE)) == 0
    out = capsys.readouterr().out
    found = results(tmp_path)["guidances"]
    assert len(found) == 14
    assert len(tiny.asked) == 280
    assert "14 trials, 280 of 280 images spent; 0 left out" in out
    assert "Pareto front (FD-TINY, Recall, NFE)" in out
    done = trials(tmp_path)
    for entry, trial in zip(found, done, strict=True):
        values = {name: shown(trial["params"][name]) for name in ("w", "lo", "hi")}
        assert entry["label"] == fill(INTERVAL, values)
        metrics = entry["metrics"]
        assert trial["values"] == [metrics["frechet"]["value"], metrics["recall"]["value"], entry["cost"]["nfe_mean"]]
        assert 1 <= trial["params"]["w"] <= 8
        assert 0.01 <= trial["params"]["lo"] <= 1
    # The same seeds and classes for every trial.
    assert len({(seed, label) for _, seed, label in tiny.asked}) == 20


def test_a_stopped_search_goes_on_as_if_it_had_not_been(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(args("tune", tmp_path / "whole", *TUNE)) == 0
    # In the middle of a trial, between two of them, and not at all: a trial has 20 images, a block 10.
    for stop, code in ((130, 130), (70, 130), (None, 0)):
        pipe = FakePipeline(stop_after=stop)
        monkeypatch.setattr(command, "load_pipeline", lambda model, device, pipe=pipe: pipe)
        assert invoke(args("tune", tmp_path / "parts", *TUNE)) == code
        assert len(pipe.asked) == (stop or 80)
    assert "Go on with:" in capsys.readouterr().err
    assert trials(tmp_path / "parts") == trials(tmp_path / "whole")
    assert labels(tmp_path / "parts") == labels(tmp_path / "whole")


def test_another_search_in_the_folder_is_refused(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [*TUNE[:-1], "40 images"]
    assert invoke(args("tune", tmp_path, *short)) == 0
    assert invoke(args("tune", tmp_path, *short, "--objective", "nfe")) == 2
    assert "holds another search: objectives is" in capsys.readouterr().err
    assert invoke(args("tune", tmp_path, *short, "--objective", "nfe", "--overwrite")) == 0
    assert len(labels(tmp_path)) == 2
    # More of the same search is no other search.
    assert invoke(args("tune", tmp_path, *TUNE[:-1], "80 images", "--objective", "nfe")) == 0
    assert len(labels(tmp_path)) == 4


def test_a_budget_of_evaluations_is_not_overspent(tiny: FakePipeline, tmp_path: Path) -> None:
    # A trial takes 3.5 evaluations for each of 20 images.
    assert invoke(args("tune", tmp_path, *TUNE[:-1], "300")) == 0
    spent = sum(entry["cost"]["nfe_mean"] * entry["n"] for entry in results(tmp_path)["guidances"])
    assert spent == pytest.approx(280)


def test_refused_trials_are_counted_and_do_not_go_on_for_ever(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = ["--guidance", "Interval(CFG(3.0), {lo}, 1.0)", "--range", "lo=0.5:2", "--budget", "100 images"]
    assert invoke(args("tune", tmp_path / "some", *most)) == 0
    refused = int(re.search(r"; (\d+) left out", capsys.readouterr().out)[1])  # type: ignore[index]
    assert len(labels(tmp_path / "some")) == 5
    assert refused == sum(trial["state"] == "FAIL" for trial in trials(tmp_path / "some"))
    assert refused > 0
    never = ["--guidance", "Interval(CFG(3.0), {lo}, 1.0)", "--range", "lo=2:3", "--budget", "100 images"]
    assert invoke(args("tune", tmp_path / "none", *never)) == 2
    assert "no combination of lo=2:3 works" in capsys.readouterr().err


BAD = {
    "a budget that is none": (["--budget", "plenty"], "--budget: got 'plenty'"),
    "a budget for no trial": (["--budget", "19 images"], "one trial takes 20 images"),
    "no range": (["--guidance", "CFG({w})", "--budget", "1e6"], "--range"),
    "a range upside down": (["--range", "w=8:1"], "--range w: got '8:1'"),
    "a log range from zero": (["--range", "w=0:1:log"], "--range w: got '0:1:log'"),
    "a range without end": (["--range", "w=1:inf"], "--range w: got '1:inf' (finite numbers"),
    "steps without end": (["--range", "w=1:8:inf"], "--range w: got '1:8:inf' (finite numbers"),
    "a name given twice": (["--range", "w=1:2", "--range", "w=1:3"], "given twice"),
    "a name of no template": (["--range", "w=1:8", "--range", "x=1:2"], "no --guidance has a place {x}"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_searches_are_one_line(case: str, tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, expected = BAD[case]
    given = {"--guidance": "CFG({w})", "--range": "w=1:8", "--budget": "1e6"}
    rest = [part for key, value in given.items() if key not in more and case != "no range" for part in (key, value)]
    assert invoke(args("tune", tmp_path, *more, *rest)) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert tiny.asked == []


def test_budgets_and_ranges_are_read() -> None:
    assert Budget.parse("2e6") == Budget(2e6, "evaluations")
    assert Budget.parse(" 20000 images") == Budget(20000, "images")
    assert Budget.parse("7evaluations") == Budget(7, "evaluations")
    low = distribution_of("0.01:1:log", "--range")
    assert (low.low, low.high, low.log) == (0.01, 1.0, True)  # type: ignore[attr-defined]
    assert distribution_of("1:4:int", "--range").to_internal_repr(3) == 3
    assert distribution_of("1:2:0.5", "--range").step == 0.5  # type: ignore[attr-defined]
    assert distribution_of("1:2:0.3", "--range").high == pytest.approx(1.9)  # type: ignore[attr-defined]
    assert distribution_of("linear,cosine", "--range").choices == ("linear", "cosine")  # type: ignore[attr-defined]


def test_a_sweep_may_stand_in_a_file(tiny: FakePipeline, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("guidance: ['CFG({w})', none]\ngrid: ['w=2:3:1']\nseed: 7\n")
    assert invoke(args("sweep", tmp_path / "x", "--config", str(tmp_path / "sweep.yaml"))) == 0
    assert labels(tmp_path / "x") == ["CFG(2)", "CFG(3)", "none"]
    assert results(tmp_path / "x")["generation"]["seed"] == 7


@pytest.mark.parametrize("name", ["sweep", "tune"])
def test_a_search_takes_the_options_of_a_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["run", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert invoke([name, "--help"]) == 0
    assert options <= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def test_a_space_of_few_values_ends(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--guidance", "CFG({w})", "--range", "w=2,3", "--budget", "1000 images"]
    assert invoke(args("tune", tmp_path, *more)) == 0
    assert "2 trials, 40 of 1,000 images spent" in capsys.readouterr().out
    assert len(tiny.asked) == 40
    made = {trial["params"]["w"]: trial["values"] for trial in trials(tmp_path)}
    assert all(trial["values"] == made[trial["params"]["w"]] for trial in trials(tmp_path))


def test_a_search_does_not_go_on_with_another_reference(
    tiny: FakePipeline, tmp_path: Path, reference_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*TUNE[:-1], "40 images"]
    assert invoke(args("tune", tmp_path / "x", *short)) == 0
    other = tmp_path / f"other{reference_file.suffix}"
    contents = read_contents(reference_file)
    write_safetensors(other, replace(contents, about={**contents.about, "dataset": "another"}))
    assert invoke(args("tune", tmp_path / "x", *short, "--reference", str(other))) == 2
    assert "holds another search: reference is" in capsys.readouterr().err


def test_objectives_are_computed(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (
        args("sweep", tmp_path, "--guidance", "CFG({w})", "--grid", "w=2,3", "--objective", "vendi", "--objective", "nfe"),
        args("tune", tmp_path, *TUNE, "--objective", "vendi"),
    ):
        assert invoke(more) == 2
        assert "--objective: vendi is not computed; --metric vendi beside it works" in capsys.readouterr().err
    assert tiny.asked == []
    assert objectives_of(None, metrics_of("cifar10", None)) == ("frechet", "nfe")
    assert objectives_of(["vendi"], metrics_of("cifar10", ["vendi"])) == ("vendi",)
