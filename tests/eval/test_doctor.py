"""The doctor: says what is wrong, and tells by its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from genkit_eval import doctor
from genkit_eval.cli import invoke
from genkit_eval.doctor import Finding
from genkit_eval.extractors import inception
from genkit_eval.extractors.weights import WeightsFile

from tests.eval.standins import FakePipeline


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and nothing of other tools."""
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(WeightsFile, "copies", lambda self: iter(()))
    monkeypatch.setattr(doctor, "weights_files", lambda: {inception.NAME: inception.WEIGHTS})
    return tmp_path / "cache"


def only(findings: Iterator[Finding], status: str) -> str:
    """The text of the one finding with this status."""
    found = [finding.text for finding in findings if finding.status == status]
    assert len(found) == 1, found
    return found[0]


def test_nothing_is_wrong_here(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = invoke(["doctor", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {f["check"] for f in found["findings"]} >= {"packages", "Frechet distance", "resize", "device", "cache", "weights"}
    # Another torchvision than torch's may be installed beside the tests; all else is in order.
    wrong = [f for f in found["findings"] if f["status"] == "wrong" and f["check"] != "torchvision"]
    assert wrong == []
    assert code == (0 if found["ok"] else 1)


def test_what_is_wrong_ends_with_one(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("no more of this")

    monkeypatch.setattr(doctor, "check_torchmetrics", broken)
    assert invoke(["doctor", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "wrong  torchmetrics: RuntimeError: no more of this" in out
    assert out.endswith("1 wrong\n") or "torchvision" in out
    assert invoke(["doctor", "--quick", "--device", "abacus"]) == 1
    assert "--device: 'abacus' cannot be used here" in capsys.readouterr().out


def test_weights_are_checked_by_their_hash(cache: Path) -> None:
    assert inception.NAME in only(doctor.check_weights(), "note")
    cache.mkdir()
    path = cache / inception.WEIGHTS.name
    path.write_bytes(b"cut short")
    text = only(doctor.check_weights(), "wrong")
    assert str(path) in text
    assert inception.WEIGHTS.sha256[:12] in text


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "check_torchvision", lambda: iter(()))
    found = list(doctor.findings("cpu", "builtin/cifar10", True))
    assert "GENKIT_CACHE: cannot write" in only((f for f in found if f.check == "cache"), "wrong")


@pytest.mark.parametrize(
    ("version", "told"),
    [("1.11.2", "wrong numbers"), ("1.12.0", "wrong numbers"), ("1.17.1", None), ("1.18.0", "no sqrtm(disp=)")],
)
def test_versions_of_scipy_that_bite_others(version: str, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    notes = [finding.text for finding in doctor.check_scipy() if finding.status == "note"]
    assert (told is None and not notes) or (told is not None and told in notes[0])
    assert next(finding.status for finding in doctor.check_scipy()) == "ok"


def test_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "0.28.0")
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: operator torchvision::nms does not exist\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **more: failed)
    assert "operator torchvision::nms does not exist" in only(doctor.check_torchvision(), "wrong")


class Shaky(FakePipeline):
    """``drift`` levels more at each call."""

    drift = 0
    calls = 0

    def __call__(self, *args: Any, **more: Any) -> Any:
        out = super().__call__(*args, **more)
        self.calls += 1
        return SimpleNamespace(**{**vars(out), "pixels": (out.pixels.int() + self.drift * self.calls).clamp(0, 255).byte()})


class Batchy(FakePipeline):
    """Images depend on their batch."""

    def __call__(self, classes: Any, *args: Any, **more: Any) -> Any:
        out = super().__call__(classes, *args, **more)
        out.pixels = (out.pixels.int() + 20 * (len(classes) > 1)).clamp(0, 255).byte()
        return out


@pytest.mark.parametrize(
    ("pipe", "twice", "batch"), [(FakePipeline(), "ok", "ok"), (Shaky(), "ok", "ok"), (Batchy(), "ok", "wrong")]
)
def test_generation_is_repeated(pipe: FakePipeline, twice: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "load_pipeline", lambda model, device: pipe)
    assert [finding.status for finding in doctor.check_generation("cpu", "any")] == [twice, batch]


def test_generation_that_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Shaky()
    pipe.drift = 1
    monkeypatch.setattr(doctor, "load_pipeline", lambda model, device: pipe)
    found = list(doctor.check_generation("cpu", "any"))
    assert found[0].status == "wrong"
    assert "up to 1 levels of 255" in found[0].text


def test_features_are_the_same_twice() -> None:
    assert [finding.status for finding in doctor.check_features("cpu")] == ["ok", "ok"]


def test_the_closed_form_would_show_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "frechet_distance", lambda *sides: 1.0)
    assert next(iter(doctor.check_scipy())).status == "wrong"
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "clean", lambda pixels, size: torch.zeros(1, 3, size, size))
    assert next(iter(doctor.check_pillow())).status == "wrong"
