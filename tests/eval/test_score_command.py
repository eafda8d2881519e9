"""``genkit-eval score`` and ``genkit-eval reference`` from end to end, on the tiny stand-ins."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval import results
from genkit_eval.cli import invoke
from genkit_eval.extractors import EXTRACTORS, Extractor
from genkit_eval.metrics.colour import contrast, saturation
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.moments import moments_of
from genkit_eval.references import load_reference
from PIL import Image
from torch import Tensor

from tests.eval.standins import tiny_features


class Counting:
    """The tiny features, and how many images went through."""

    seen = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return tiny_features(pixels)


@pytest.fixture
def network(
    monkeypatch: pytest.MonkeyPatch, extractor: Extractor, reference_file: Path, plain_plots: None, tmp_path: Path
) -> Counting:
    counting = Counting()
    own = Extractor(extractor.name, extractor.label, extractor.sha256, extractor.resize, counting, reference_file, (3, 8, 8))
    monkeypatch.setitem(EXTRACTORS, "builtin/cifar10", lambda options: own)
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return counting


def images(root: Path, n: int = 20, spread: int = 40, side: int = 8) -> Path:
    for k in range(n):
        folder = root / ("cat" if k % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).normal(120, spread, (side, side, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")
    return root


def pixels_of(root: Path) -> Tensor:
    files = sorted(root.rglob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def score(out: Path, *more: str) -> int:
    return invoke(["score", *more, "--out", str(out), "--bootstrap", "10"])


def read(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_a_folder_is_scored(
    network: Counting, tmp_path: Path, extractor: Extractor, reference_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = images(tmp_path / "set"), tmp_path / "out"
    assert score(out, str(root), "--name", "mine") == 0
    (entry,) = read(out)["guidances"]
    pixels = pixels_of(root)
    real = load_reference(reference_file, extractor).sample
    features = tiny_features(pixels)
    expected = frechet_distance(real.moments, moments_of(features))
    assert entry["metrics"]["frechet"]["value"] == pytest.approx(expected, rel=1e-9)
    assert entry["metrics"]["saturation"]["value"] == pytest.approx(float(saturation(pixels).mean()), rel=1e-12)
    assert entry["metrics"]["contrast"]["value"] == pytest.approx(float(contrast(pixels).mean()), rel=1e-12)
    assert (entry["n"], entry["label"], entry["images"]["crop"]) == (20, "mine", "none")
    assert (out / entry["grid"]).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("images")
    assert "NFE" not in shown[0]
    page = (out / "report.html").read_text()
    assert "existing images, scored in the feature space of fake/projection" in page
    assert "Sampler" not in page


def test_a_zip_of_the_folder_has_the_same_numbers_and_needs_no_second_pass(network: Counting, tmp_path: Path) -> None:
    root, out = images(tmp_path / "set"), tmp_path / "out"
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, file.relative_to(root))
    assert score(out, str(root)) == 0
    assert network.seen == 20
    assert score(out, str(tmp_path / "set.zip"), "--metric", "vendi", "--overwrite") == 0
    assert network.seen == 20
    (entry,) = read(out)["guidances"]
    assert "vendi" in entry["metrics"]
    first = entry["metrics"]["frechet"]["value"]
    assert score(tmp_path / "fresh", str(root), "--no-cache", "--workers", "1", "--batch-size", "3") == 0
    assert network.seen == 40
    assert read(tmp_path / "fresh")["guidances"][0]["metrics"]["frechet"]["value"] == pytest.approx(first, rel=1e-12)


def test_several_sets_stand_in_one_table(network: Counting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert score(out, str(images(tmp_path / "a")), str(images(tmp_path / "b", spread=80))) == 0
    assert score(out, str(images(tmp_path / "c", n=16))) == 0
    found = read(out)
    assert [(Path(e["label"]).name, e["n"]) for e in found["guidances"]] == [("a", 20), ("b", 20), ("c", 16)]
    gap = found["guidances"][1]["metrics"]["frechet"]["difference"]
    low, high = gap["interval"]
    assert low < gap["value"] < high
    assert results.check_protocol(found) is None


def test_what_does_not_work_is_said_in_one_line(network: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "set")
    (root / "cat" / "003.png").write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[str], str]] = [
        ([str(root)], "IMAGES: 1 file cannot be read: cat/003.png"),
        ([str(tmp_path / "empty")], "holds no images"),
        ([str(images(tmp_path / "few", n=7))], "has 7 images; at least 8 work"),
        ([str(images(tmp_path / "big", side=9))], "--size: extractor fake/projection takes images of 3x8x8 and these are 3x9x9"),
        ([str(root), "--metric", "nice"], "--metric: got 'nice'"),
        ([str(root), "--name", "a", "--name", "b"], "--name: got 2 for 1 sets"),
        ([str(root), "--extractor", "inception?"], "--extractor: got 'inception?'"),
        ([str(root), "--reference", str(tmp_path / "absent.npz")], "there is no such file"),
        ([str(root), "--batch-size", "0"], "--batch-size: got 0"),
    ]
    for arguments, message in cases:
        assert score(tmp_path / "out", *arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genkit-eval:")]
        assert message in line, line
    assert score(tmp_path / "out", str(root), "--max-errors", "1") == 0
    assert "1 file cannot be read: cat/003.png" in capsys.readouterr().out
    assert read(tmp_path / "out")["guidances"][0]["n"] == 19


def test_a_folder_of_other_scores_is_not_mixed_up(network: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = images(tmp_path / "a"), images(tmp_path / "b", spread=80), tmp_path / "out"
    assert invoke(["reference", "build", str(b), "--out", str(tmp_path / "r.safetensors")]) == 0
    assert score(out, str(a)) == 0
    assert score(out, str(b), "--reference", str(tmp_path / "r.safetensors")) == 2
    assert "holds scores of" in capsys.readouterr().err
    assert score(out, str(a), "--reference", str(tmp_path / "r.safetensors")) == 0
    assert score(out, str(a), "--size", "8", "--crop", "center") == 2
    assert "uint8_rule is" in capsys.readouterr().err


def test_metrics_that_the_reference_cannot_serve_are_named(
    network: Counting, tmp_path: Path, reference_features: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = moments_of(reference_features)
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    assert score(tmp_path / "out", str(images(tmp_path / "set")), "--reference", str(tmp_path / "stats.npz")) == 0
    (entry,) = read(tmp_path / "out")["guidances"]
    assert "frechet" in entry["metrics"]
    assert "recall" not in entry["metrics"]
    assert "holds only mean and covariance" in entry["not_available"]["Recall"]
    out = capsys.readouterr().out
    assert "note: Recall is not available: needs layer features of each reference image" in out
    assert "does not record the weights" in out
    assert "number of images not recorded" in (tmp_path / "out" / "report.html").read_text()


def test_a_full_disk_leaves_earlier_results(
    network: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert score(out, str(images(tmp_path / "a"))) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", lambda self, content: full(self, content) if len(content) > 10 else len(content))
    monkeypatch.setattr("genkit_eval.commands.score.check_writable", lambda folder: None)
    monkeypatch.setattr("genkit_eval.run.check_writable", lambda folder: None)
    assert score(out, str(images(tmp_path / "b", spread=80))) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    assert [e["label"] for e in read(out)["guidances"]] == [str(tmp_path / "a")]


def test_reference_commands(network: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "set")
    ours, adm, back = (tmp_path / name for name in ("r.safetensors", "VIRTUAL_r.npz", "back.safetensors"))
    assert invoke(["reference", "build", str(root), "--out", str(ours), "--dataset", "noise", "--keep-images", "4"]) == 0
    assert invoke(["reference", "convert", str(ours), "--out", str(adm)]) == 0
    assert invoke(["reference", "convert", str(adm), "--out", str(back), "--extractor", "builtin/cifar10"]) == 0
    capsys.readouterr()
    shown = {}
    for path in (ours, adm, back):
        assert invoke(["reference", "show", str(path), "--json"]) == 0
        shown[path.name] = json.loads(capsys.readouterr().out)
    assert (
        shown["r.safetensors"]["dataset"] == shown["VIRTUAL_r.npz"]["dataset"] == shown["back.safetensors"]["dataset"] == "noise"
    )
    assert all(found["layers"]["features"] == {"width": 5, "moments": True, "rows": 20} for found in shown.values())
    assert invoke(["reference", "show", str(adm)]) == 0
    text = capsys.readouterr().out
    assert "num_images       20" in text
    assert "images           (4, 8, 8, 3) uint8" in text
    values = []
    for path in (ours, adm, back):
        assert score(tmp_path / f"out-{path.name}", str(images(tmp_path / "other", spread=60)), "--reference", str(path)) == 0
        values.append(read(tmp_path / f"out-{path.name}")["guidances"][0]["metrics"]["frechet"]["value"])
    assert values == [pytest.approx(values[0], rel=1e-9)] * 3
    assert values[0] > 0


def test_a_foreign_reference_is_stamped_by_whom_converts_it(
    network: Counting, tmp_path: Path, reference_features: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, out = moments_of(reference_features), tmp_path / "r.safetensors"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    source = tmp_path / "VIRTUAL_tiny.npz"
    np.savez(source, arr_0=pixels, mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    convert = ["reference", "convert", str(source), "--out", str(out)]
    assert invoke(convert) == 2
    assert "--extractor: " in capsys.readouterr().err
    assert invoke([*convert, "--extractor", "builtin/cifar10"]) == 2
    assert "was made with the resize rule 'adm', and fake/projection here uses 'none'" in capsys.readouterr().err
    np.savez(tmp_path / "plain.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    plain = ["reference", "convert", str(tmp_path / "plain.npz"), "--out", str(out), "--extractor", "builtin/cifar10"]
    assert invoke([*plain, "--num-images", "60", "--dataset", "noise"]) == 0
    capsys.readouterr()
    assert invoke(["reference", "show", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_images"], found["extractor_said_by"], found["resize"]) == ("60", "whoever converted the file", "none")
    assert invoke(["reference", "build", str(images(tmp_path / "set")), "--out", str(tmp_path / "r.csv")]) == 2
    assert "--out: got" in capsys.readouterr().err
