"""Runs: what is written, what is not done twice, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from genkit_eval import provenance
from genkit_eval.blocks import BlockStore
from genkit_eval.config import slug
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor, load_extractor
from genkit_eval.files import STALE_AFTER, remove_leftovers, temporary_beside, write_bytes, write_json
from genkit_eval.labels import label_of, labels_of
from genkit_eval.metrics import METRICS, Sample
from genkit_eval.references import Reference, load_reference
from genkit_eval.results import check_protocol, write_results
from genkit_eval.run import blocks_done, make_config
from genkit_eval.score import difference
from safetensors.torch import load, save_file

from genkit.guidance import CFG
from tests.eval.standins import FakePipeline, Runner

TEXTS = ("none", "CFG(2.0)")
TIMING = ("seconds_wall", "seconds_cpu")


def numbers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries without what a clock measured."""
    entries: list[dict[str, Any]] = json.loads(json.dumps(results["guidances"]))
    for entry in entries:
        for key in TIMING:
            entry["cost"].pop(key)
    return entries


def blocks(out: Path) -> list[Path]:
    return sorted(out.glob("*/blocks/*.safetensors"))


def test_results_say_how_they_were_made(runner: Runner, pipe: FakePipeline) -> None:
    found = runner(pipe, *TEXTS)
    assert found == json.loads((runner.out / "results.json").read_text())
    assert found["status"] == "complete"
    assert [entry["label"] for entry in found["guidances"]] == list(TEXTS)
    assert found["guidances"][1]["guidance"] == repr(CFG(2.0))
    assert found["extractor"]["sha256"] == "e" * 64
    assert found["reference"]["sha256"] == "a" * 64
    assert found["generation"]["model_sha256"] == "f" * 64
    assert {"python", "torch", "numpy", "genkit"} <= set(found["versions"])
    assert {"cpu", "cores"} <= set(found["hardware"])
    assert {"backend", "asked_by", "torch"} <= set(found["attention"])
    assert found["date"].endswith("Z")
    entry = found["guidances"][0]
    # Those of layers that the stand-in does not make have no number.
    assert set(entry["metrics"]) == {n for n, spec in METRICS.items() if spec.standard and {*spec.inputs} <= {"features"}}
    for name, metric in entry["metrics"].items():
        assert metric["variant"] == METRICS[name].protocol(runner.extractor, metric["n_real"] or 0, 25)
        assert metric["n_fake"] == 25
        assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    assert entry["metrics"]["frechet"]["title"] == "FD-TINY"
    variants = {name: entry["metrics"][name]["variant"] for name in ("frechet", "recall", "saturation")}
    assert variants == {"frechet": "fd/tiny", "recall": "pr/exact/k3/tiny", "saturation": "saturation/hsv-mean"}
    assert "FID" not in json.dumps([m["title"] for m in entry["metrics"].values()])
    assert entry["cost"]["nfe_mean"] == pytest.approx(3 + 12 / 25)
    assert entry["trace"][0]["sigma"] == 80.0
    assert entry["trace"][-1]["cosine"] is None
    assert (runner.out / entry["grid"]).exists()


def test_guidances_share_seeds_and_labels(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, *TEXTS)
    made: dict[str, list[tuple[int, int]]] = {}
    for guidance, seed, label in pipe.asked:
        made.setdefault(repr(guidance), []).append((seed, label))
    first, second = made.values()
    assert first == second == [(k, k % 3) for k in range(25)]


def temporary_of(path: Path, pid: int) -> Path:
    """A temporary name as process ``pid`` of this machine would choose it."""
    return path.with_name(temporary_beside(path).name.replace(f".{os.getpid()}.", f".{pid}."))


# No process has such a number: Linux stops at 2**22.
GONE = 2**22 + 7


def test_a_finished_run_makes_nothing_again(runner: Runner, pipe: FakePipeline) -> None:
    found = runner(pipe, *TEXTS)
    again = FakePipeline()
    assert runner(again, *TEXTS)["guidances"] == found["guidances"]
    assert again.asked == []


def test_deleted_and_broken_blocks_are_made_again_bit_for_bit(runner: Runner, pipe: FakePipeline) -> None:
    found = numbers(runner(pipe, *TEXTS))
    before = {path: load(path.read_bytes()) for path in blocks(runner.out)}
    first, second, *_ = before
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    leftover = temporary_of(first, GONE)
    leftover.write_bytes(b"half")
    again = FakePipeline()
    assert numbers(runner(again, *TEXTS)) == found
    assert len(again.asked) == 20
    assert not leftover.exists()
    for path, tensors in before.items():
        now = load(path.read_bytes())
        assert all(torch.equal(now[name], tensors[name]) for name in tensors)


def test_an_interrupted_run_goes_on_to_the_same_numbers(runner: Runner, tmp_path: Path, pipe: FakePipeline) -> None:
    whole = numbers(runner(pipe, *TEXTS, out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        runner(FakePipeline(stop_after=40), *TEXTS)
    partial = json.loads((runner.out / "results.json").read_text())
    assert partial["status"] == "partial"
    assert [entry["label"] for entry in partial["guidances"]] == ["none"]
    config = make_config(pipe, runner.extractor, "heun", 3, 0, "balanced", 10)
    assert blocks_done(config, runner.request(*TEXTS)) == (5, 6)
    rest = FakePipeline()
    assert numbers(runner(rest, *TEXTS)) == whole
    assert [seed for _, seed, _ in rest.asked] == list(range(20, 25))


def test_a_run_grows_and_shrinks(runner: Runner, tmp_path: Path, pipe: FakePipeline) -> None:
    small = numbers(runner(pipe, "none", n=20))
    more = FakePipeline()
    grown = numbers(runner(more, "none", n=40))
    assert [seed for _, seed, _ in more.asked] == list(range(20, 40))
    assert grown == numbers(runner(FakePipeline(), "none", n=40, out=tmp_path / "at-once"))
    idle = FakePipeline()
    assert numbers(runner(idle, "none", n=20)) == small
    assert idle.asked == []


def test_a_second_command_adds_its_guidance(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, "none")
    found = runner(pipe, "CFG(2.0)")
    assert [entry["label"] for entry in found["guidances"]] == ["none", "CFG(2.0)"]
    gap = found["guidances"][1]["metrics"]["frechet"]["difference"]
    values = [entry["metrics"]["frechet"]["value"] for entry in found["guidances"]]
    assert gap["value"] == pytest.approx(values[1] - values[0])
    assert gap["interval"][0] <= gap["value"] <= gap["interval"][1]
    assert found["guidances"][0]["metrics"]["frechet"]["difference"] is None


def test_different_sample_counts_are_not_subtracted(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, "none", n=20)
    found = runner(pipe, "CFG(2.0)", n=30)
    assert found["guidances"][1]["metrics"]["frechet"]["difference"] is None
    assert any("Sample counts differ" in warning for warning in found["warnings"])


def test_another_configuration_in_the_folder_is_refused(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, "none", n=20)
    stamp = [path.stat().st_mtime_ns for path in blocks(runner.out)]
    with pytest.raises(InputError, match=r"--out: .* steps is 3 there and 4 here\. Choose another folder, or --overwrite"):
        runner(FakePipeline(), "none", n=20, steps=4)
    assert [path.stat().st_mtime_ns for path in blocks(runner.out)] == stamp
    found = runner(FakePipeline(), "none", n=20, steps=4, overwrite=True)
    assert found["generation"]["steps"] == 4
    assert len(found["guidances"]) == 1


def test_overwrite_leaves_foreign_files(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, "none", n=20)
    note = runner.out / "notes.txt"
    note.write_text("mine")
    runner(pipe, "none", n=20, overwrite=True)
    assert note.read_text() == "mine"


@pytest.mark.parametrize("below", ["file/run", "file"])
def test_an_unwritable_folder_is_found_before_work(runner: Runner, pipe: FakePipeline, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="--out: cannot write in"):
        runner(pipe, "none", out=tmp_path / below)
    assert pipe.asked == []


def test_a_disk_that_fills_up_is_one_clear_error(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"--out: cannot write in .*No space left"):
        runner(FakePipeline(stop_after=10, error=OSError(28, "No space left on device")), "none")
    assert len(blocks(runner.out)) == 1


def test_a_model_that_refuses_or_diverges_names_the_guidance(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"--guidance 'CFG\(2.0\)': needs a weak model"):
        runner(FakePipeline(stop_after=0, error=ValueError("needs a weak model")), "CFG(2.0)")
    broken = Extractor("fake/projection", "TINY", "e" * 64, "none", lambda pixels: torch.full((len(pixels), 5), torch.nan))
    with pytest.raises(InputError, match="not finite"):
        Runner(broken, runner.reference, runner.out)(FakePipeline(), "none")


def test_request_checks() -> None:
    from genkit_eval.run import Request

    with pytest.raises(InputError, match="--num-samples: got 3; at least 8"):
        Request((("none", None),), 3, Path("x"))
    with pytest.raises(InputError, match="--guidance: none given"):
        Request((), 20, Path("x"))
    with pytest.raises(InputError, match="given twice"):
        Request((("a", 1), ("b", 1)), 20, Path("x"))


def test_labels() -> None:
    assert labels_of(range(4), 3) == [0, 1, 2, 0]
    drawn = labels_of(range(3000), 10, "random", seed=1)
    assert drawn[100:200] == labels_of(range(100, 200), 10, "random", seed=1)
    assert drawn != labels_of(range(3000), 10, "random", seed=2)
    assert min(drawn.count(c) for c in range(10)) > 230
    assert labels_of(range(7), 3, "sorted:7") == [0, 0, 0, 1, 1, 2, 2]
    assert labels_of(range(1, 3), 10, "file:abc", classes=(9, 4, 4)) == [4, 4]
    for rule in ("sorted", "sorted:", "file:abc", "other"):
        with pytest.raises(ValueError, match=f"labels: got '{rule}' for image 0"):
            label_of(0, 10, rule)


def test_slugs_are_short_safe_and_different() -> None:
    long = "Interval(" * 10 + "CFG(3.0)" + ", 0.1, 5.0)" * 10
    names = {slug(text) for text in ("CFG(3.0)", "CFG(3.00)", long, long + " ", "../../x", "none")}
    assert len(names) == 6
    assert all(len(name) <= 48 and "/" not in name and not name.startswith(".") for name in names)


def test_a_block_of_another_configuration_does_not_count(runner: Runner, pipe: FakePipeline) -> None:
    runner(pipe, "none", n=20)
    folder = blocks(runner.out)[0].parent
    assert not BlockStore(folder, "other").done(0, 10)


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises((NotADirectoryError, FileExistsError)):
        write_bytes(path / "below" / "y", b"")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_no_number_without_its_protocol(runner: Runner, pipe: FakePipeline) -> None:
    found = runner(pipe, "none", n=20)
    for part, key in (("extractor", "sha256"), ("reference", "sha256"), ("generation", "uint8_rule")):
        lacking = {**found, part: {k: v for k, v in found[part].items() if k != key}}
        with pytest.raises(ValueError, match=f"results lack {part}.{key}"):
            check_protocol(lacking)
    with pytest.raises(ValueError, match="results lack"):
        write_results(runner.out, {}, found["guidances"], complete=True)


def test_reference_file(reference_file: Path, extractor: Extractor, tmp_path: Path) -> None:
    found = load_reference(reference_file, extractor)
    assert found.num_images == 60
    assert len(found.sha256) == 64
    assert not found.sample.owns_moments
    other = Extractor("other", "OTHER", "b" * 64, "none", extractor.features)
    with pytest.raises(InputError, match=r"--reference: .* was made with extractor fake/projection \(eeee.* but other is bbbb"):
        load_reference(reference_file, other)
    with pytest.raises(InputError, match="no reference of its own"):
        load_reference(None, extractor)
    with pytest.raises(InputError, match="cannot be read"):
        load_reference(tmp_path / "absent.safetensors", extractor)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(reference_file.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_reference(broken, extractor)
    save_file({"mean": torch.zeros(5)}, broken)
    with pytest.raises(InputError, match="lacks cov, features, num_images"):
        load_reference(broken, extractor)


def test_unknown_extractor() -> None:
    with pytest.raises(InputError, match=r"--extractor: got 'inception'; one of builtin/cifar10, inception-2015, .* works"):
        load_extractor("inception")


def other_reference(reference: Reference) -> Reference:
    return Reference(Sample(reference.sample.features + 0.5), "fake/other", "b" * 64, 60, "shifted noise")


def test_earlier_guidances_are_scored_again_for_another_reference(
    runner: Runner, reference: Reference, tmp_path: Path, pipe: FakePipeline
) -> None:
    runner(pipe, "none")
    second = Runner(runner.extractor, other_reference(reference), runner.out)
    more = FakePipeline()
    found = second(more, "CFG(2.0)")
    assert len(more.asked) == 25
    assert [entry["reference_sha256"] for entry in found["guidances"]] == ["b" * 64] * 2
    whole = Runner(runner.extractor, other_reference(reference), tmp_path / "whole")(FakePipeline(), *TEXTS)
    assert numbers(found) == numbers(whole)


def test_numbers_under_earlier_names_are_scored_again(runner: Runner, pipe: FakePipeline) -> None:
    """A results file of a version that named protocols otherwise: nothing of it may stand beside new numbers."""
    found = runner(pipe, *TEXTS)
    path = runner.out / "results.json"
    path.write_text(path.read_text().replace("fd/tiny", "fd/float64").replace("/k3/tiny", "/k3"))
    more = FakePipeline()
    again = runner(more, "CFG(3.0)")
    assert {guidance for guidance, _, _ in more.asked} == {CFG(3.0)}
    assert numbers(again)[:2] == numbers(found)


def test_scores_of_another_reference_without_blocks_are_refused(runner: Runner, reference: Reference, pipe: FakePipeline) -> None:
    runner(pipe, "none")
    shutil.rmtree(blocks(runner.out)[0].parent)
    second = Runner(runner.extractor, other_reference(reference), runner.out)
    more = FakePipeline()
    with pytest.raises(InputError, match=r"--out: .* holds scores of none with another --reference or --bootstrap"):
        second(more, "CFG(2.0)")
    assert more.asked == []
    assert [entry["label"] for entry in second(more, "none")["guidances"]] == ["none"]


def test_scores_of_two_references_are_not_subtracted() -> None:
    ours = {"value": 2.0, "replicates": [1.0, 2.0, 3.0], "n_fake": 9, "variant": "v", "basis": "a"}
    assert difference(ours, {**ours, "value": 1.5}) is not None
    assert difference(ours, {**ours, "basis": "b"}) is None


def test_only_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "none" / "blocks" / "00000.safetensors"
    path.parent.mkdir(parents=True)
    own, gone, alive = temporary_of(path, os.getpid()), temporary_of(path, GONE), temporary_of(path, os.getppid())
    elsewhere, old = path.with_name(f"{path.name}.0.{GONE}.0.writing"), temporary_of(path, os.getppid())
    for file in (own, gone, alive, elsewhere, old):
        file.write_bytes(b"half")
    past = old.stat().st_mtime - STALE_AFTER - 60
    os.utime(old, (past, past))
    remove_leftovers(tmp_path)
    assert {file for file in (own, gone, alive, elsewhere, old) if file.exists()} == {alive, elsewhere}


def test_a_block_that_another_process_has_begun_comes_last(runner: Runner, pipe: FakePipeline) -> None:
    runner(FakePipeline(), "none", n=40)
    first, *rest = blocks(runner.out)
    for path in rest:
        path.unlink()
    claim = temporary_of(rest[0], os.getppid())
    claim.touch()
    runner(pipe, "none", n=40)
    assert [seed for _, seed, _ in pipe.asked] == [*range(20, 40), *range(10, 20)]
    assert sorted(first.parent.iterdir()) == sorted([first, *rest, claim])


def test_a_model_of_another_image_size_is_refused_before_work(runner: Runner, pipe: FakePipeline) -> None:
    takes = Extractor("fake/large", "LARGE", "e" * 64, "none", runner.extractor.features, image_shape=(3, 32, 32))
    with pytest.raises(InputError, match="--model: fake/tiny makes images of 3x8x8; extractor fake/large takes 3x32x32"):
        Runner(takes, runner.reference, runner.out)(pipe, "none")
    assert pipe.asked == []
    assert load_extractor("builtin/cifar10").image_shape == (3, 32, 32)


def test_only_what_the_pipeline_says_is_blamed_on_the_guidance(runner: Runner) -> None:
    def refuse(pixels: torch.Tensor) -> torch.Tensor:
        raise ValueError("wrong dtype")

    broken = Extractor("fake/projection", "TINY", "e" * 64, "none", refuse)
    with pytest.raises(ValueError, match=r"^wrong dtype$"):
        Runner(broken, runner.reference, runner.out)(FakePipeline(), "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": "abc"}, "num_images is 'abc'; a whole number from 2 on works"),
        ({"num_images": "1"}, "num_images is '1'"),
        ({"mean": torch.tensor(1.0)}, r"got mean \(\) and features"),
        ({"features": torch.zeros(5, 5)}, "holds 5 features; at least 6 work"),
    ],
)
def test_a_reference_that_cannot_be_used(
    change: dict[str, Any], message: str, reference_file: Path, extractor: Extractor
) -> None:
    tensors = load(reference_file.read_bytes())
    metadata = {"num_images": "60", "extractor_sha256": extractor.sha256}
    tensors |= {k: v for k, v in change.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, reference_file, metadata | {k: v for k, v in change.items() if isinstance(v, str)})
    with pytest.raises(InputError, match=f"--reference: .*{message}"):
        load_reference(reference_file, extractor)


def test_blocks_say_which_commit_made_them(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    for commit, dirty, n in (("1" * 40, False, 10), ("2" * 40, True, 25)):
        monkeypatch.setattr(provenance, "git_commit", lambda known={"commit": commit, "dirty": dirty}: known)
        found = runner(FakePipeline(), "none", n=n)
        assert len(found["warnings"]) == (1 if n == 10 else 2)
    made = [{"commit": "1" * 40, "dirty": False, "device": "cpu"}, {"commit": "2" * 40, "dirty": True, "device": "cpu"}]
    assert found["guidances"][0]["made_with"] == made
    assert found["warnings"][1].endswith("by 2 different commits: 111111111111, 222222222222 with changes.")
