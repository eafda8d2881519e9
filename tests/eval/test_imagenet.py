"""ImageNet from end to end: photographs in folders, a DiT of 1,000 classes, the protocol of ADM. All of it tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval import command
from genkit_eval.blocks import BlockStore
from genkit_eval.cli import invoke
from genkit_eval.diffusers_classes import DiffusersClasses
from genkit_eval.extractors import EXTRACTORS, Extractor, Options
from genkit_eval.extractors.quantise import UINT8_RULES
from genkit_eval.labels import label_of
from genkit_eval.report.grid import class_grid
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from genkit.guidance import CFG
from tests.eval.standins import FakePipeline, Runner
from tests.pipelines.tiny_diffusers import dit

SIDE = 16
GENERATOR = torch.Generator().manual_seed(3)
PROJECTIONS = {
    name: torch.randn(3 * 64, width, generator=GENERATOR) for name, width in (("features", 12), ("spatial", 7), ("logits", 20))
}


def small_inception(options: Options) -> Extractor:
    """The layers of the Inception of 2015, each narrow."""

    def features(pixels: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(pixels.float(), (8, 8), mode="area").flatten(1) / 255
        return {name: x @ weights for name, weights in PROJECTIONS.items()}

    layers = {name: weights.shape[1] for name, weights in PROJECTIONS.items()}
    rule = options.rule("inception-2015", {"tf1": "adm-tf1", "clean": "clean"})
    variant = {"tf1": "adm-tf1", "clean": "clean"}[rule]
    return Extractor("inception-2015", "Inception", "1" * 64, rule, features, layers=layers, variant=variant, fid="FID")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain_plots: None) -> Path:
    monkeypatch.setitem(EXTRACTORS, "inception-2015", small_inception)
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    dit().save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit" / "model_index.json"  # where the published DiT has its names
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}))
    for k in range(30):
        folder = tmp_path / "photos" / f"n{k // 2:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (20 + k % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.JPEG")
    return tmp_path


def build(place: Path, out: str, *more: str) -> int:
    photos = f"imagenet:{place / 'photos'}"
    return invoke(
        ["reference", "build", photos, "--out", str(place / out), "--size", str(SIDE), "--extractor", "inception-2015", *more]
    )


def run(place: Path, out: str, *more: str) -> int:
    plain = ["--model", str(place / "dit"), "--num-samples", "9", "--steps", "2", "--block-size", "4", "--bootstrap", "4"]
    return invoke(["run", "--preset", "adm-imagenet-256", "--out", str(place / out), "--guidance", "CFG(1.5)", *plain, *more])


def results(place: Path, out: str) -> Any:
    return json.loads((place / out / "results.json").read_text())


def test_the_adm_preset_runs_a_dit_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(place, "ours.safetensors") == 0
    assert build(place, "adm.npz", "--keep-images", "12") == 0
    assert run(place, "run", "--reference", str(place / "ours.safetensors")) == 0
    found = results(place, "run")
    (entry,) = found["guidances"]
    variants = {name: metric["variant"] for name, metric in entry["metrics"].items()}
    assert variants == {
        "frechet": "fid/adm-tf1",
        "sfid": "sfid/adm-tf1",
        "inception_score_adm": "is/adm-order/5000/adm-tf1",
        "precision_adm": "pr/adm-fp16/k3/30-9",
        "recall_adm": "pr/adm-fp16/k3/30-9",
        "precision": "pr/exact/k3/adm-tf1",
        "recall": "pr/exact/k3/adm-tf1",
    }
    assert [entry["metrics"][name]["title"] for name in ("frechet", "sfid")] == ["FID", "sFID"]
    generation = found["generation"]
    assert (generation["sampler"], generation["steps"], len(generation["class_names"])) == ("bridge", 2, 1000)
    assert generation["uint8_rule"] == UINT8_RULES["adm-floor"].formula
    assert generation["image_shape"] == [3, SIDE, SIDE]
    assert found["preset"]["changed"] == {"num_samples": {"preset": 50000, "used": 9}}
    assert entry["cost"]["nfe_mean"] == 4
    # ADM's own file, in which statistics are those of all images and precision and recall read a part of them.
    assert run(place, "adm", "--reference", str(place / "adm.npz")) == 0
    other = results(place, "adm")["guidances"][0]["metrics"]
    for name in ("frechet", "sfid", "inception_score_adm"):
        assert other[name]["value"] == pytest.approx(entry["metrics"][name]["value"], rel=1e-6), name
    assert {"precision_adm", "recall"} <= set(other)
    store = BlockStore(next((place / "run").glob("*/blocks")), entry["config_sha256"])
    assert store.read_all(9, 4).labels.tolist() == [label_of(k, 1000, "random") for k in range(9)]
    assert run(place, "none") == 2
    assert "--reference: preset adm-imagenet-256 compares with VIRTUAL_imagenet256_labeled.npz" in capsys.readouterr().err
    assert run(place, "wrong", "--reference", str(place / "ours.safetensors"), "--resize", "clean") == 2
    assert "was made with the resize rule 'tf1'" in capsys.readouterr().err


def test_a_dit_folder_is_a_pipeline_of_classes(place: Path) -> None:
    pipe = command.load_pipeline(str(place / "dit"), "cpu")
    assert isinstance(pipe, DiffusersClasses)
    assert (pipe.num_classes, pipe.image_shape, pipe.class_names[:3]) == (1000, (3, SIDE, SIDE), ("Tinca tinca", "goldfish", "2"))
    assert command.settle_sampler(pipe, None, None) == ("bridge", 50)
    assert command.settle_sampler(pipe, "heun", 4) == ("heun", 4)
    with pytest.raises(ValueError, match="--sampler"):
        command.settle_sampler(pipe, "hoin", 4)
    ask: dict[str, Any] = {"guidance": CFG(2.0), "sampler": "bridge", "steps": 2}
    both = pipe([7, 999], [3, 4], **ask)
    alone = pipe([999], [4], **ask)
    assert both.latents.min() >= -1
    torch.testing.assert_close(both.latents[1:], alone.latents, atol=1e-4, rtol=0)
    own = dit()(class_labels=[999], guidance_scale=1.0, num_inference_steps=1, output_type="np")  # in [0, 1], as diffusers rounds
    assert own.images.shape == (1, SIDE, SIDE, 3)
    assert torch.equal(both.pixels, UINT8_RULES["half-even"](both.latents))
    assert (both.nfe, len(both.trace.rows)) == ([4, 4], 2)
    changed = dit()
    with torch.no_grad():
        changed.transformer.pos_embed.proj.bias.add_(1)
    changed.save_pretrained(place / "other")
    changed.transformer.pos_embed.proj.bias.data.sub_(1)
    assert command.load_pipeline(str(place / "other"), "cpu").fingerprint != pipe.fingerprint


def test_a_pipeline_of_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.pipelines.tiny_diffusers import sd15

    sd15().save_pretrained(tmp_path / "sd")
    assert invoke(["run", "--guidance", "none", "--out", str(tmp_path / "x"), "--model", str(tmp_path / "sd")]) == 2
    assert "is a StableDiffusionPipeline, which takes text; only models of classes work" in capsys.readouterr().err


def test_pixels_of_a_part_of_the_images_are_kept(runner: Runner) -> None:
    """Pixel metrics are those of all images, pictures show the ones that are there."""
    from dataclasses import replace

    from genkit_eval.run import make_config, run

    whole = runner(FakePipeline(), "none", n=25)
    pipe = FakePipeline()
    config = make_config(pipe, runner.extractor, "heun", 3, 0, "balanced", 10, keep_images=13)
    request = replace(runner.request("none", n=25), out=runner.out.with_name("part"))
    found = run(pipe, runner.extractor, runner.reference, config, request)
    values = [{name: m["value"] for name, m in results["guidances"][0]["metrics"].items()} for results in (whole, found)]
    assert values[0] == values[1]
    store = BlockStore(next(request.out.glob("*/blocks")), found["guidances"][0]["config_sha256"])
    assert [len(store.read(i).pixels) for i in range(3)] == [10, 3, 0]
    assert len(store.read_all(25, 10).pixels) == 13
    assert len(store.read_all(25, 10, shown=4).pixels) == 4
    none = make_config(pipe, runner.extractor, "heun", 3, 0, "balanced", 10, keep_images=0)
    bare = replace(request, out=runner.out.with_name("none"))
    found = run(FakePipeline(), runner.extractor, runner.reference, none, bare)
    assert found["guidances"][0]["metrics"]["contrast"]["value"] == values[0]["contrast"]
    assert not list(bare.out.glob("*/grid.png"))


def test_blocks_of_earlier_versions_have_their_pixel_metrics_too(runner: Runner) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    whole = runner(FakePipeline(), "none", n=25)
    for path in runner.out.glob("*/blocks/*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("layer.pixels.")}  # noqa: SIM118
            metadata = file.metadata()
        save_file(tensors, path, metadata)
    next(runner.out.glob("*/scores.json")).unlink()
    idle = FakePipeline()
    again = runner(idle, "none", n=25)
    assert idle.asked == []
    assert again["guidances"][0]["metrics"]["saturation"]["value"] == whole["guidances"][0]["metrics"]["saturation"]["value"]


def grey(*levels: int, side: int = 4) -> Tensor:
    return torch.stack([torch.full((3, side, side), level, dtype=torch.uint8) for level in levels])


def test_grids_of_a_thousand_classes() -> None:
    names = [f"class {k}" for k in range(1000)]
    labels = [k % 1000 for k in range(5000)]
    sheet = class_grid(grey(*range(200)), labels, names)  # one of each class: as they come, ten by ten
    assert sheet.height == 10 * (2 * 4 + 2)
    often = [3] * 12 + [7] * 5 + [1] * 4 + list(range(100, 130))
    sheet = class_grid(grey(*range(len(often))), often, names, columns=10)
    assert sheet.height == 10 * (2 * 4 + 2)
    large = class_grid(grey(1, 2, side=256), [0, 1], ["a", "b"])
    assert large.height == 2 * (128 + 2)
    long = class_grid(grey(1), [0], ["x" * 500])
    assert long.width < 400
