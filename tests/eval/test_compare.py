"""Several runs together: the front, merged reports, exports and comparisons, and what may not stand beside each other."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from genkit_eval.blocks import BlockStore
from genkit_eval.cli import invoke
from genkit_eval.compare import Change, Side, compare, why_unpaired
from genkit_eval.extractors import Extractor
from genkit_eval.metrics.counts import draw_counts, interval
from genkit_eval.pareto import best_first, front
from genkit_eval.references import Reference
from genkit_eval.report import plots
from genkit_eval.report.build import figures, shown_of
from genkit_eval.run import make_config, run
from genkit_eval.runs import read_run

from tests.eval.standins import FakePipeline, Runner

FIRST, SECOND = ("none", "CFG(2.0)"), ("none", "APG(4.0)")


@pytest.fixture(scope="module")
def made(extractor: Extractor, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``a`` and ``b`` on the same seeds, ``other`` on others, ``small`` with fewer images."""
    folder = tmp_path_factory.mktemp("runs")
    Runner(extractor, reference, folder / "a")(FakePipeline(), *FIRST)
    Runner(extractor, reference, folder / "b")(FakePipeline(), *SECOND, steps=5)
    Runner(extractor, reference, folder / "small")(FakePipeline(), "none", n=20)
    runner = Runner(extractor, reference, folder / "other")
    pipe = FakePipeline()
    run(pipe, extractor, reference, make_config(pipe, extractor, "heun", 3, 7, "balanced", 10), runner.request(*FIRST))
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def side(path: Path, number: int) -> Side:
    found = read_run(path)
    return Side(found, found.entries[number])


def change_results(path: Path, **values: Any) -> None:
    """Put values into every Frechet distance of a run, or into the entries where the name is one of theirs."""
    results = json.loads((path / "results.json").read_text())
    for entry in results["guidances"]:
        for key, value in values.items():
            (entry if key in entry else entry["metrics"]["frechet"])[key] = value
    (path / "results.json").write_text(json.dumps(results))


def entry(label: str, frechet: float, recall: float | None, nfe: float) -> dict[str, Any]:
    numbers = {"frechet": (frechet, "lower"), "recall": (recall, "higher")}
    metrics = {
        name: {"value": value, "better": better, "title": name.title(), "interval": None}
        for name, (value, better) in numbers.items()
        if value is not None
    }
    return {"label": label, "metrics": metrics, "cost": {"nfe_mean": nfe, "seconds_wall": 1.0}, "n": 10, "trace": []}


def test_the_front_holds_what_nothing_beats() -> None:
    entries = [
        entry("best distance", 5.0, 0.4, 16.0),
        entry("cheaper", 6.0, 0.4, 12.0),
        entry("more varied", 6.0, 0.5, 16.0),
        entry("beaten", 6.0, 0.4, 14.0),
        entry("equal to the best", 5.0, 0.4, 16.0),
        entry("without recall", 1.0, None, 1.0),
    ]
    assert front(entries) == [True, True, True, False, True, False]
    assert front(entries, ("frechet", "nfe")) == [False, False, False, False, False, True]
    assert front(entries[:5], ("recall",)) == [False, False, True, False, False]
    assert front(entries[:5], ("frechet", "nfe")) == [True, True, False, False, True]
    assert [e["label"] for e in best_first(entries[:4])] == ["best distance", "cheaper", "more varied"]


def test_of_many_the_first_and_the_best_are_shown() -> None:
    entries = [entry(str(k), 5.0 + abs(k - 7), 0.5, 10.0) for k in range(plots.MANY + 1)]
    assert [number for number, shown in enumerate(shown_of(entries)) if shown] == [0, 7]
    assert all(shown_of(entries[:-1]))
    assert plots.against(entries, "nfe", "frechet").startswith(b"\x89PNG")
    assert [figure["title"] for figure in figures(entries)] == ["Frechet against NFE", "Frechet against Recall"]


def test_paired_differences_are_those_of_one_run(made: Path) -> None:
    first, second = side(made / "a", 0), side(made / "a", 1)
    assert why_unpaired(first, second) is None
    for change in compare(first, second):
        if change.name in ("nfe", "seconds"):
            assert change.interval is None
            continue
        known = second.entry["metrics"][change.name]["difference"]
        assert change.paired
        assert change.change == pytest.approx(known["value"])
        assert change.interval == pytest.approx(known["interval"])


def test_a_paired_interval_is_that_of_differences_resampled_together(made: Path) -> None:
    """Saturation is a mean over images: a resample's change is the weighted mean of the images' changes."""
    first, second = side(made / "a", 1), side(made / "b", 1)
    change = next(c for c in compare(first, second) if c.name == "saturation")
    values = []
    for s in (first, second):
        store = BlockStore(s.run.folder / s.entry["slug"] / "blocks", s.entry["config_sha256"])
        pixels = store.read_all(25, 10).pixels.double() / 255
        high, low = pixels.amax(1), pixels.amin(1)
        values.append(((high - low) / high.clamp(min=1e-12)).mean((1, 2)))
    gaps = values[1] - values[0]
    counts = draw_counts(25, 60, 20).fake
    expected = interval(float(gaps.mean()), counts @ gaps / 25)
    assert change.paired
    assert change.change == pytest.approx(float(gaps.mean()), rel=1e-5)
    assert change.interval == pytest.approx(expected, rel=1e-4)


def test_other_seeds_or_counts_are_not_paired(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("other", "seed differ"), ("small", "sample counts differ (25 and 20)")):
        first, second = side(made / "a", 0), side(made / name, 0)
        assert why_unpaired(first, second) == reason
        changes = [c for c in compare(first, second) if c.variant]
        assert not any(c.paired for c in changes)
        assert all(c.interval is not None and c.interval[0] <= c.change <= c.interval[1] for c in changes)
        assert invoke(["compare", f"{made / 'a'}:none", f"{made / name}:none"]) == 0
        assert f"unpaired: {reason}" in capsys.readouterr().out


def test_an_unpaired_interval_has_the_width_of_both(made: Path) -> None:
    first, second = side(made / "a", 0), side(made / "other", 0)
    scores = [torch.tensor(s.run.scores(s.entry)["frechet"]["replicates"], dtype=torch.float64) for s in (first, second)]
    spread = torch.stack([b - a for a in scores[0] for b in scores[1]])
    change = next(c for c in compare(first, second) if c.name == "frechet")
    assert change.interval == pytest.approx(interval(change.change, spread))


def test_a_verdict_needs_an_interval_without_zero() -> None:
    known = {"name": "x", "title": "X", "variant": "x", "first": 1.0, "second": 2.0, "change": 1.0, "paired": True}
    for better, limits, expected in (
        ("lower", (0.5, 1.5), "worse"),
        ("higher", (0.5, 1.5), "better"),
        ("lower", (-0.5, 2.5), ""),
        ("neither", (0.5, 1.5), ""),
        ("lower", None, ""),
    ):
        assert Change(**known, better=better, interval=limits).verdict == expected  # type: ignore[arg-type]


def test_compare_names_guidances_in_several_ways(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in ("CFG(2.0)", "CFG( 2 )", "CFG(scale=2.0)"):
        assert invoke(["compare", f"{made / 'a'}:{wanted}", f"{made / 'b'}:APG(4.0)"]) == 0
        out = capsys.readouterr().out
        assert "first:  " in out
        assert "a: CFG(2.0)" in out
        assert "paired: both have the same seeds" in out
    # What both have in common, of whole runs.
    assert invoke(["compare", str(made / "a"), str(made / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(pair["first"]["guidance"], pair["second"]["guidance"]) for pair in found] == [("none", "none")]
    changes = {change["name"]: change for change in found[0]["changes"]}
    assert changes["nfe"]["change"] == pytest.approx(2.0)
    assert changes["frechet"]["change"] == 0.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a:CFG(9.0)", "b:none", "has no guidance 'CFG(9.0)'; it has none, CFG(2.0)"),
        ("a:none", "b", "has several guidances; name one"),
        ("nowhere", "b", "there is no nowhere"),
        ("a:CFG(2.0)", "b:APG(4.0)", ""),
    ],
)
def test_a_comparison_that_cannot_be_meant(
    first: str, second: str, message: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert invoke(["compare", first, second]) == (2 if message else 0)
    assert message in capsys.readouterr().err


MIXED = {
    "variants": ({"variant": "fid/clean"}, ("fd/tiny", "fid/clean", "numbers of different protocols cannot")),
    "references": ({"reference_sha256": "b" * 64}, ("aaaaaaaaaaaa", "bbbbbbbbbbbb")),
}


@pytest.mark.parametrize("case", list(MIXED))
def test_numbers_of_two_protocols_do_not_stand_together(case: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, told = MIXED[case]
    change_results(runs / "b", **values)
    page = runs / "merged.html"
    pages = ["--html", str(page), "--csv", str(runs / "x.csv")]
    for command in (
        ["report", str(runs / "a"), str(runs / "b"), *pages],
        ["compare", f"{runs / 'a'}:none", f"{runs / 'b'}:none"],
    ):
        assert invoke(command) == 2
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1
        assert all(part in err for part in (*told, "RUN: ")), err
    assert not page.exists()
    assert not (runs / "x.csv").exists()


def test_a_reference_of_no_known_count_is_a_reference_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        path = runs / name / "results.json"
        results = json.loads(path.read_text())
        for entry in results["guidances"]:
            entry["metrics"] = {key: entry["metrics"][key] for key in ("frechet", "saturation")}
            entry["metrics"]["frechet"]["n_real"] = None
        path.write_text(json.dumps(results))
    assert invoke(["report", str(runs / "a"), str(runs / "b"), "--csv", str(runs / "same.csv")]) == 0
    change_results(runs / "b", reference_sha256="b" * 64)
    assert invoke(["report", str(runs / "a"), str(runs / "b"), "--csv", str(runs / "x.csv")]) == 2
    assert "FD-TINY is fd/tiny against reference aaaaaaaaaaaa" in capsys.readouterr().err


def test_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    for text in ("[]", '{"schema": "genkit-eval/1"}', '{"schema": "genkit-eval/1", "guidances": [{"label": "x"}]}'):
        path.write_text(text)
        for command in (["report", str(tmp_path)], ["compare", str(tmp_path), str(path)]):
            assert invoke(command) == 2
            assert "is not a results file of this version" in capsys.readouterr().err


def test_a_report_is_not_written_over_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["report", str(runs / "a"), "--csv", str(runs)]) == 2
    assert f"--csv: {runs} is a folder" in capsys.readouterr().err


def test_a_merged_page_has_every_run(runs: Path, plain_plots: None, capsys: pytest.CaptureFixture[str]) -> None:
    page = runs / "merged.html"
    before = (runs / "a" / "results.json").read_bytes()
    assert invoke(["report", str(runs / "a"), str(runs / "b"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    for label in ("a: none", "a: CFG(2.0)", "b: none", "b: APG(4.0)"):
        assert label in out
        assert label in page.read_text()
    text = page.read_text()
    assert "Differences to a: none" in text
    assert "a.generation.sampler" in text
    assert "b.generation.steps" in text
    assert "several, see below" in text  # steps are not the same
    assert "on the same seeds and classes" in text
    assert (runs / "a" / "results.json").read_bytes() == before
    assert invoke(["report", str(runs / "a"), str(runs / "other"), "--html", str(page)]) == 0
    assert "on the same seeds and classes" not in page.read_text()


def test_a_report_of_one_run_is_written_into_it(runs: Path, plain_plots: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["report", str(runs / "a")]) == 0
    assert (runs / "a" / "report.html").exists()
    assert capsys.readouterr().out == f"report: {runs / 'a' / 'report.html'}\n"
    # A results file by itself has nowhere of its own to be reported in.
    shutil.move(runs / "a" / "results.json", runs / "kept.json")
    assert invoke(["report", str(runs / "kept.json")]) == 0
    assert "CFG(2.0)" in capsys.readouterr().out
    assert invoke(["report", str(runs / "b"), str(runs / "b")]) == 2


def test_the_csv_has_every_digit_and_protocol(runs: Path) -> None:
    assert invoke(["report", str(runs / "a"), str(runs / "b"), "--csv", str(runs / "t.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((runs / "t.csv").read_text())))
    entries = [e for name in "ab" for e in read_run(runs / name).entries]
    assert [row["run"] for row in rows] == ["a", "a", "b", "b"]
    for row, found in zip(rows, entries, strict=True):
        assert row["guidance"] == found["guidance"]
        for name, metric in found["metrics"].items():
            assert float(row[name]) == metric["value"]
            assert [float(row[f"{name}_low"]), float(row[f"{name}_high"])] == metric["interval"]
            assert row[f"{name}_variant"] == metric["variant"]
        assert float(row["nfe_mean"]) == found["cost"]["nfe_mean"]
    assert {row["on_front"] for row in rows} <= {"0", "1"}


def test_the_latex_table_is_escaped_and_whole(runs: Path) -> None:
    change_results(runs / "a", label="50 % of_it & {all}")
    assert invoke(["report", str(runs / "a"), "--latex", str(runs / "t.tex")]) == 0
    text = (runs / "t.tex").read_text()
    lines = text.splitlines()
    assert r"50 \% of\_it \& \{all\}" in text
    assert r"FD-TINY $\downarrow$" in text
    begin, end = (next(i for i, line in enumerate(lines) if part in line) for part in (r"\begin{tabular}", r"\end{tabular}"))
    columns = lines[begin].count("r") - lines[begin].split("{l")[0].count("r")
    body = [line for line in lines[begin:end] if line.endswith(r"\\")]
    assert len(body) == 3
    assert all(line.replace(r"\&", "").count("&") == columns for line in body)
    assert r"\textbf{" in text
    assert any(line.startswith("% FD-TINY: ") for line in lines)
