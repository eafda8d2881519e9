"""The command line: one clear line for what does not work, and a run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from genkit_eval import command, report
from genkit_eval.cli import invoke
from genkit_eval.extractors import EXTRACTORS, Extractor

from tests.eval.standins import FakePipeline


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, extractor: Extractor, reference_file: Path, plain_plots: None) -> FakePipeline:
    """The stand-ins behind the real command."""
    pipe = FakePipeline()
    own = Extractor(extractor.name, extractor.label, extractor.sha256, extractor.resize, extractor.features, reference_file)
    monkeypatch.setitem(EXTRACTORS, "builtin/cifar10", lambda device: own)
    monkeypatch.setattr(command, "load_pipeline", lambda model, device: pipe)
    return pipe


def run_args(out: Path, *more: str) -> list[str]:
    short = ["--num-samples", "20", "--steps", "3", "--block-size", "10", "--bootstrap", "10"]
    return ["run", "--out", str(out), *short, *more]


def test_run_prints_the_table_and_writes_the_report(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(run_args(tmp_path / "x", "--guidance", "none", "--guidance", "Interval(CFG(3.0), 0.28, 5.42)")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "FD-TINY" in lines[0]
    assert "NFE" in lines[0]
    assert lines[2].startswith("none")
    assert lines[3].startswith("Interval(CFG(3.0), 0.28, 5.42)")
    assert "note: The Frechet distance of 20 images" in out
    assert "40/40" in err
    assert {"results.json", "report.html", "compare.png", "run.json"} <= {path.name for path in (tmp_path / "x").iterdir()}
    assert invoke(["report", str(tmp_path / "x")]) == 0


def test_quickstart_compares_five(tiny: FakePipeline, tmp_path: Path) -> None:
    assert invoke(["quickstart", "--out", str(tmp_path / "q"), "--num-samples", "20", "--bootstrap", "4"]) == 0
    found = json.loads((tmp_path / "q" / "results.json").read_text())
    assert [entry["label"] for entry in found["guidances"]] == list(command.QUICKSTART)


def test_an_interrupt_says_how_to_go_on(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.stop_after = 20
    assert invoke(run_args(tmp_path / "x", "--guidance", "none", "--guidance", "CFG(2.0)")) == 130
    _, err = capsys.readouterr()
    assert "interrupted: 2 of 4 blocks are finished and kept. Go on with:" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "x" / "results.json").read_text())["status"] == "partial"
    tiny.stop_after = None
    assert invoke(run_args(tmp_path / "x", "--guidance", "none", "--guidance", "CFG(2.0)")) == 0
    assert "2 of 4 blocks are there already" in capsys.readouterr().err
    assert len(tiny.asked) == 40


BAD = {
    "python in a guidance": (["--guidance", "__import__('os').system('x')"], "--guidance"),
    "an attribute": (["--guidance", "CFG.__class__(3)"], "--guidance"),
    "an unknown guidance": (["--guidance", "CGF(3.0)"], "did you mean ICG or CFG"),
    "an interval upside down": (["--guidance", "Interval(CFG(3.0), 5.0, 0.1)"], "--guidance"),
    "the same guidance twice": (["--guidance", "CFG(3.0)", "--guidance", "CFG(3)"], "twice"),
    "too few images": (["--guidance", "none", "--num-samples", "2"], "--num-samples: got 2; at least 8 works"),
    "no steps": (["--guidance", "none", "--steps", "0"], "--steps: got 0; 1 or more works"),
    "no block": (["--guidance", "none", "--block-size", "0"], "--block-size: got 0"),
    "one resample": (["--guidance", "none", "--bootstrap", "1"], "--bootstrap: got 1"),
    "a negative seed": (["--guidance", "none", "--seed", "-4"], "--seed: got -4; 0 to"),
    "unknown labels": (["--guidance", "none", "--labels", "abc"], "got 'abc'; balanced, random, sorted or file:PATH works"),
    "an absent label file": (["--guidance", "none", "--labels", "file:nowhere"], "--labels: nowhere cannot be read"),
    "an unknown 8-bit rule": (["--guidance", "none", "--uint8", "round"], "got 'round'; one of adm-floor, edm, half-up"),
    "an unknown metric": (["--guidance", "none", "--metric", "fid"], "--metric: got 'fid'; one of "),
    "a metric of an absent part": (["--guidance", "none", "--metric", "kid@clip"], "extractor fake/projection is one network"),
    "an unknown preset": (["--guidance", "none", "--preset", "adm"], "--preset: got 'adm'; one of adm-imagenet-256, edm2"),
    "an unknown sampler": (["--guidance", "none", "--sampler", "hoin"], "--sampler"),
    "an unknown extractor": (["--guidance", "none", "--extractor", "inception"], "--extractor: got 'inception'"),
    "an absent reference": (["--guidance", "none", "--reference", "nowhere.safetensors"], "--reference: nowhere.safetensors"),
    "an unknown device": (["--guidance", "none", "--device", "abacus"], "--device: 'abacus' cannot be used here"),
    "no guidance": ([], "--guidance"),
    "not a number": (["--guidance", "none", "--steps", "many"], "--steps"),
    "an unknown option": (["--guidance", "none", "--stepz", "3"], "--stepz"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line(case: str, tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, expected = BAD[case]
    assert invoke(run_args(tmp_path / "x", *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("genkit-eval: ")
    assert expected in err
    assert tiny.asked == []


def test_a_folder_that_cannot_be_written(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert invoke(run_args(tmp_path / "file" / "x", "--guidance", "none")) == 2
    assert "--out: cannot write in" in capsys.readouterr().err
    assert tiny.asked == []


def test_another_run_in_the_folder(tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(run_args(tmp_path, "--guidance", "none")) == 0
    assert invoke(run_args(tmp_path, "--guidance", "none", "--seed", "7")) == 2
    assert "seed is 0 there and 7 here" in capsys.readouterr().err
    assert invoke(run_args(tmp_path, "--guidance", "none", "--seed", "7", "--overwrite")) == 0


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"schema": "other"}'])
def test_a_report_of_nothing(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert invoke(["report", str(tmp_path)]) == 2
    assert "RUN: " in capsys.readouterr().err


def test_model_errors_name_the_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for model in ("builtin/imagenet", str(tmp_path / "absent.safetensors")):
        with pytest.raises(ValueError, match=r"^--model: "):
            command.load_pipeline(model, "cpu")


def test_a_report_package_that_is_missing_is_said_first(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else object())
    assert invoke(run_args(tmp_path / "x", "--guidance", "none")) == 2
    assert invoke(["report", str(tmp_path / "x")]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert "jinja2 not installed; pip install 'genkit-image[eval]'" in line
    assert tiny.asked == []


def test_a_folder_that_vanishes_is_one_line(
    tiny: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(*args: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "compare.png")

    monkeypatch.setattr(command, "compare_sheet", vanish)
    assert invoke(run_args(tmp_path / "x", "--guidance", "none")) == 2
    assert "genkit-eval: No such file or directory (compare.png)" in capsys.readouterr().err


def python(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, **more)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_load_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from genkit_eval.cli import invoke
assert invoke({args!r}) == 0
heavy = {{"torch", "numpy", "matplotlib", "jinja2", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "genkit-eval" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    code = f"import sys, runpy; sys.path[:0] = {sys.path!r}; sys.argv = ['genkit_eval', 'run']; runpy.run_module('genkit_eval')"
    done = python("-c", code.replace("run_module('genkit_eval')", "run_module('genkit_eval', run_name='__main__')"))
    assert done.returncode == 2
    assert "--guidance" in done.stderr
    assert "Traceback" not in done.stderr
