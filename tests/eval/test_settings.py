"""Options of a run beyond the usual ones: labels, 8-bit rules, metrics, presets, and all of them from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from genkit_eval import command
from genkit_eval.cli import invoke
from genkit_eval.extractors import EXTRACTORS, Extractor
from genkit_eval.extractors.quantise import UINT8_RULES
from genkit_eval.generate import make_block
from genkit_eval.metrics import METRICS
from genkit_eval.presets import PRESETS
from genkit_eval.run import make_config, store_of
from genkit_eval.settings import read_yaml
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from genkit.guidance import NoGuidance
from genkit.pipelines.images import UINT8_RULE, to_uint8
from tests.eval.standins import FakePipeline, Runner, tiny_features


@dataclass
class FloatPipeline(FakePipeline):
    """One whose images are known before they are made 8 bits."""

    def __call__(self, classes: Sequence[int | str], seeds: Sequence[int], guidance: Any, **options: Any) -> Any:
        out = super().__call__(classes, seeds, guidance, **options)
        noise = [torch.rand(self.image_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = torch.stack(noise) * 2.2 - 1.1
        return SimpleNamespace(**{**vars(out), "latents": latents, "pixels": to_uint8(latents)})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, extractor: Extractor, reference_file: Path, plain_plots: None) -> FloatPipeline:
    """The stand-ins behind the real command, under the names that presets ask for too."""
    pipe = FloatPipeline()

    def make(options: Any) -> Extractor:
        return Extractor(
            extractor.name,
            extractor.label,
            extractor.sha256,
            options.resize or "none",
            tiny_features,
            reference_file,
            variant="tiny",
        )

    for name in ("builtin/cifar10", "inception-2015"):
        monkeypatch.setitem(EXTRACTORS, name, make)
    monkeypatch.setattr(command, "load_pipeline", lambda model, device: pipe)
    return pipe


SHORT = {"guidance": ["none"], "num_samples": 20, "steps": 3, "block_size": 10, "bootstrap": 10}


def run(out: Path, *more: str, **options: Any) -> int:
    given = {**SHORT, **options}
    words = [
        w for k, v in given.items() for one in (v if isinstance(v, list) else [v]) for w in (f"--{k.replace('_', '-')}", str(one))
    ]
    return invoke(["run", "--out", str(out), *words, *more])


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def pixels(out: Path) -> Tensor:
    return torch.cat([load(path.read_bytes())["pixels"] for path in sorted(out.glob("*/blocks/*.safetensors"))])


def test_labels_from_a_file_and_sorted(tiny: FloatPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(str(k % 2) for k in range(20)))
    assert run(tmp_path / "a", labels=f"file:{file}") == 0
    assert [label for _, _, label in tiny.asked] == [k % 2 for k in range(20)]
    generation = results(tmp_path / "a")["generation"]
    assert generation["labels"].startswith("file:")
    assert generation["label_rule"].startswith("line k of a file of class indices with SHA-256")
    file.write_text("\n".join(str(k % 3) for k in range(20)))
    assert run(tmp_path / "a", labels=f"file:{file}") == 2
    assert "labels is file:" in capsys.readouterr().err
    for text, message in (
        ("0\n1", "has 2 lines for 20 images"),
        ("x", "not one class index a line"),
        ("7 " * 20, "line 1 is class 7"),
    ):
        file.write_text(text)
        assert run(tmp_path / "b", labels=f"file:{file}") == 2
        assert message in capsys.readouterr().err
    tiny.asked.clear()
    assert run(tmp_path / "c", labels="sorted") == 0
    assert [label for _, _, label in tiny.asked] == [k * 3 // 20 for k in range(20)]
    assert results(tmp_path / "c")["generation"]["label_rule"] == "class floor(k C / N) of N images, N = 20"
    assert run(tmp_path / "c", labels="sorted", num_samples=30) == 2
    assert "labels is sorted:20 there and sorted:30 here" in capsys.readouterr().err


def test_the_rule_for_8_bits_is_applied_and_recorded(tiny: FloatPipeline, tmp_path: Path) -> None:
    latents = tiny(classes=[k % 3 for k in range(20)], seeds=range(20), guidance=None, sampler="", steps=1, trace=None).latents
    for rule in UINT8_RULES:
        assert run(tmp_path / rule, uint8=rule) == 0
        assert torch.equal(pixels(tmp_path / rule), UINT8_RULES[rule](latents))
        assert results(tmp_path / rule)["generation"]["uint8_rule"] == UINT8_RULES[rule].formula
    assert run(tmp_path / "own") == 0
    assert torch.equal(pixels(tmp_path / "own"), pixels(tmp_path / "edm"))
    assert UINT8_RULES["edm"].formula == UINT8_RULE
    assert not torch.equal(pixels(tmp_path / "own"), pixels(tmp_path / "adm-floor"))


def test_metrics_by_name(tiny: FloatPipeline, tmp_path: Path) -> None:
    assert run(tmp_path / "x", metric=["vendi", "precision_adm"]) == 0
    (entry,) = results(tmp_path / "x")["guidances"]
    assert {"vendi", "precision_adm", "frechet", "recall"} <= set(entry["metrics"])
    assert entry["metrics"]["precision_adm"]["variant"] == "pr/adm-fp16/k3/60-20/tiny"
    made = len(tiny.asked)
    assert run(tmp_path / "x", metric="kid_subsets") == 0  # scored again from the stored features
    (entry,) = results(tmp_path / "x")["guidances"]
    assert "vendi" not in entry["metrics"]
    assert "needs at least 1,000" in entry["not_available"]["KID-TINY (subsets)"]
    assert len(tiny.asked) == made


def test_a_preset_sets_what_is_not_given_and_says_what_was(
    tiny: FloatPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "x", "--preset", "adm-imagenet-256", "--resize", "none", "--metric", "vendi") == 0
    found = results(tmp_path / "x")
    assert set(found["guidances"][0]["metrics"]) == {"frechet", "precision", "recall", "precision_adm", "recall_adm", "vendi"}
    assert "sFD-TINY" in found["guidances"][0]["not_available"]
    assert found["preset"]["name"] == "adm-imagenet-256"
    changed = {"num_samples": {"preset": 50000, "used": 20}, "resize": {"preset": ["tf1"], "used": ["none"]}}
    assert found["preset"]["changed"] == changed
    assert found["generation"]["labels"] == "random"
    assert found["generation"]["uint8_rule"] == UINT8_RULES["adm-floor"].formula
    assert found["extractor"]["name"] == "fake/projection"
    seen: list[Any] = []
    monkeypatch.setattr(command, "execute", seen.append)
    assert invoke(["run", "--guidance", "none", "--out", "x", "--preset", "edm2", "--labels", "balanced"]) == 0
    (options,) = seen
    assert (options.extractor, options.num_samples, options.labels) == ("inception-2015+dinov2-vit-l-14", 50_000, "balanced")
    assert options.metrics.names == ("frechet", "frechet@dinov2")
    assert options.protocol()["changed"] == {"labels": {"preset": "random", "used": "balanced"}}


def test_resize_rules_of_a_preset_are_for_its_networks(
    tiny: FloatPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "execute", seen.append)
    start = ["run", "--guidance", "none", "--out", "x", "--preset", "cifar10"]
    file = tmp_path / "run.yaml"
    file.write_text("extractor: builtin/cifar10\n")
    for more in (
        ["--extractor", "builtin/cifar10"],
        ["--config", str(file)],
        ["--extractor", "builtin/cifar10", "--resize", "tf1"],
        ["--resize", "tf1", "--extractor", "builtin/cifar10"],
        ["--extractor", "inception-2015"],
    ):
        assert invoke([*start, *more]) == 0
    assert [options.resize for options in seen] == [None, None, ["tf1"], ["tf1"], ["tf1"]]
    assert seen[0].protocol()["changed"]["resize"] == {"preset": ["tf1"], "used": None}


def test_presets_ask_for_what_there_is() -> None:
    for preset in PRESETS.values():
        assert all(name.partition("@")[0] in METRICS for name in preset.metrics)
        assert all(name in EXTRACTORS for name in preset.extractor.split("+"))
        assert preset.uint8 is None or preset.uint8 in UINT8_RULES
        assert preset.as_dict(preset.options())["changed"] == {}


def test_a_file_says_what_the_command_line_says(tiny: FloatPipeline, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    whole = {**SHORT, "guidance": ["none", "CFG(2.0)"], "out": str(tmp_path / "a"), "labels": "random", "metric": "vendi"}
    file.write_text(yaml.safe_dump({**whole, "seed": 5}))
    assert invoke(["run", "--config", str(file), "--seed", "7"]) == 0
    del whole["out"]
    assert run(tmp_path / "b", **{**whole, "seed": 7}) == 0
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    assert first["generation"] == second["generation"]
    assert first["generation"]["seed"] == 7
    values = [[{n: m["value"] for n, m in e["metrics"].items()} for e in found["guidances"]] for found in (first, second)]
    assert values[0] == values[1]


def test_a_preset_may_stand_in_the_file(tiny: FloatPipeline, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({**SHORT, "preset": "adm-imagenet-256", "resize": "none", "uint8": "half-up", "overwrite": True})
    )
    assert invoke(["run", "--config", str(file), "--out", str(tmp_path / "x")]) == 0
    found = results(tmp_path / "x")
    assert set(found["preset"]["changed"]) == {"num_samples", "resize", "uint8"}
    assert found["generation"]["labels"] == "random"
    order = ["--preset", "cifar10", "--config", str(file), "--out", str(tmp_path / "y"), "--labels", "balanced"]
    assert invoke(["run", *order]) == 0
    found = results(tmp_path / "y")
    assert found["preset"]["name"] == "cifar10"
    assert set(found["preset"]["changed"]) == {"num_samples", "resize", "uint8", "labels"}


WRONG = {
    "num_sampels: 3": "run has no option 'num_sampels'; did you mean num_samples?",
    "num-samples: 3": "did you mean num_samples?",
    "xyz: 3": "has no option 'xyz'; it knows",
    "- 1": "holds no mapping",
    "a: [": "is not YAML",
    "steps: [1, 2]": "steps is [1, 2]; one value works",
    "guidance: {a: 1}": "guidance is {'a': 1}; one value or a list of values works",
    "steps: true": "steps is True, which YAML makes of yes",
    "labels: no": "labels is False, which YAML makes of yes",
    "steps: many": "Invalid value for '--steps'",
    "config: other.yaml": "has no option 'config'",
}


@pytest.mark.parametrize("text", list(WRONG))
def test_what_does_not_work_in_a_file(text: str, tiny: FloatPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert run(tmp_path / "x", "--config", str(file), **({"steps": []} if "steps" in text else {})) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert WRONG[text] in line
    assert tiny.asked == []


def test_a_file_is_not_code(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: !!python/object/apply:os.system ['exit 3']")
    with pytest.raises(ValueError, match=r"--config: .*is not YAML"):
        read_yaml(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def folder_of_images(root: Path, n: int = 12) -> Path:
    root.mkdir()
    for k in range(n):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{k:02d}.png")
    return root


def test_score_takes_presets_and_files(tiny: FloatPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = folder_of_images(tmp_path / "set"), tmp_path / "score.yaml"
    file.write_text(yaml.safe_dump({"images": [str(images)], "preset": "clean-fid", "cache": False, "bootstrap": 10}))
    assert invoke(["score", "--config", str(file), "--out", str(tmp_path / "a"), "--resize", "none", "--metric", "recall"]) == 0
    found = results(tmp_path / "a")
    assert set(found["guidances"][0]["metrics"]) == {"frechet", "recall"}
    assert found["preset"]["name"] == "clean-fid"
    changed = {"resize": {"preset": ["clean"], "used": ["none"]}, "num_samples": {"preset": 50000, "used": 12}}
    assert found["preset"]["changed"] == changed
    assert "KID-TINY (subsets)" in found["guidances"][0]["not_available"]
    file.write_text(yaml.safe_dump({"labels": "random"}))
    assert invoke(["score", str(images), "--config", str(file), "--out", str(tmp_path / "b")]) == 2
    assert "score has no option 'labels'" in capsys.readouterr().err
    assert invoke(["score", "--out", str(tmp_path / "b")]) == 2


def test_pixels_end_with_the_first_image_that_has_none(runner: Runner, extractor: Extractor) -> None:
    pipe = FakePipeline()
    few = replace(make_config(pipe, extractor, "heun", 3, 0, "balanced", 10), keep_images=4)
    store = store_of(few, runner.request("none"), NoGuidance())
    store.write(0, make_block(pipe, NoGuidance(), extractor, few, range(10)))
    store.write(1, make_block(pipe, NoGuidance(), extractor, replace(few, keep_images=50), range(10, 20)))
    whole = store.read_all(20, 10)
    assert len(whole) == 20
    assert torch.equal(whole.pixels, store.read(0).pixels)
    assert len(whole.pixels) == 4
