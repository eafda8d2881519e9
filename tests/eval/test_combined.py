"""Several extractors in one pass, and metrics over the features of one of them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from genkit_eval.cli import invoke
from genkit_eval.extractors import EXTRACTORS, Extractor, load_extractor
from genkit_eval.extractors.combined import combine
from genkit_eval.extractors.table import by_name
from genkit_eval.metrics import Sample
from genkit_eval.metrics.cmmd import cmmd
from genkit_eval.metrics.moments import moments_of
from genkit_eval.metrics.sample import Pair
from genkit_eval.references import Reference, load_reference
from genkit_eval.score import Bootstrap, score
from genkit_eval.selection import Metrics
from torch import Tensor

from tests.eval.standins import tiny_features
from tests.eval.test_settings import FloatPipeline, results, run, tiny

__all__ = ["tiny"]


def part(name: str, factor: float, layers: int = 1) -> Extractor:
    def features(images: Tensor) -> dict[str, Tensor]:
        found = tiny_features(images) * factor
        return {"features": found, **({"logits": found + 1} if layers > 1 else {})}

    known = {"features": 5, **({"logits": 5} if layers > 1 else {})}
    return Extractor(name, name.upper(), name[0] * 64, "none", features, layers=known, variant=f"{name}-v")


def test_combined_extractors_have_layers_of_their_own() -> None:
    images = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    both = combine([part("one", 1.0, layers=2), part("two", 2.0, layers=2)])
    found = both(images)
    assert list(found) == list(both.layers) == ["features", "logits", "two", "two.logits"]
    torch.testing.assert_close(found["two"], 2 * found["features"])
    assert (both.name, both.label, both.variant, both.resize) == ("one+two", "ONE", "one-v", "none; two: none")
    assert len({both.sha256, part("one", 1).sha256, combine([part("two", 1), part("one", 1)]).sha256}) == 3
    with pytest.raises(ValueError, match="are of one kind"):
        combine([part("one", 1.0), part("one", 2.0)])


def test_a_run_over_two_extractors(
    tiny: FloatPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXTRACTORS, "one", lambda options: part("one", 1.0, layers=2))
    monkeypatch.setitem(EXTRACTORS, "two", lambda options: part("two", 2.0, layers=2))
    rng = torch.Generator().manual_seed(4)
    photos = torch.randint(256, (40, 8, 8, 3), generator=rng, dtype=torch.uint8).numpy()
    np.savez(tmp_path / "photos.npz", arr_0=photos)
    build = ["reference", "build", str(tmp_path / "photos.npz"), "--no-cache", "--extractor"]
    assert invoke([*build, "one+two", "--out", str(tmp_path / "both.safetensors")]) == 0
    assert invoke([*build, "one", "--out", str(tmp_path / "one.safetensors")]) == 0
    more = ["frechet@two", "recall@two", "recall@one", "inception_score_whole@two"]
    args = {"extractor": "one+two", "metric": more}
    assert run(tmp_path / "x", reference=tmp_path / "both.safetensors", **args) == 0
    metrics = results(tmp_path / "x")["guidances"][0]["metrics"]
    assert metrics["frechet@two"]["value"] == pytest.approx(4 * metrics["frechet"]["value"], rel=1e-9)
    assert metrics["recall@two"]["value"] == metrics["recall"]["value"]
    names = {name: (metrics[name]["variant"], metrics[name]["title"]) for name in ("frechet", "frechet@two", "recall@two")}
    assert names == {
        "frechet": ("fd/one-v", "FD-ONE"),
        "frechet@two": ("fd/two-v", "FD-TWO"),
        "recall@two": ("pr/exact/k3/two-v", "Recall (TWO)"),
    }
    assert metrics["inception_score_whole@two"]["variant"].endswith("/two-v")
    assert "FD-TWO" in capsys.readouterr().out
    assert run(tmp_path / "y", reference=tmp_path / "one.safetensors", **args) == 0  # serves the first alone
    entry = results(tmp_path / "y")["guidances"][0]
    assert entry["metrics"]["frechet"]["value"] == metrics["frechet"]["value"]
    assert "needs mean and covariance of layer two" in entry["not_available"]["FD-TWO"]
    assert run(tmp_path / "z", extractor="one", reference=tmp_path / "both.safetensors") == 2
    assert "was made with extractor one+two" in capsys.readouterr().err


def test_an_edm2_pkl_serves_both_networks(tmp_path: Path) -> None:
    """``fid`` for the Inception, ``fd_dinov2`` for the other; one that lacks an entry is refused."""
    rows = {
        name: torch.randn(50, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k, name in enumerate("ab")
    }
    entries = {name: {"mu": x.mean(0).numpy(), "sigma": torch.cov(x.T).numpy()} for name, x in rows.items()}
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps({"num_images": 50, "fid": entries["a"], "fd_dinov2": entries["b"]}))
    first = Extractor("inception-2015", "Inception", "1" * 64, "tf1", tiny_features, layers={"features": 5})
    second = Extractor(
        "dinov2-vit-l-14", "DINOv2", "2" * 64, "torch-bicubic-antialias", tiny_features, layers={"features": 5}, part="dinov2"
    )
    both = combine([first, second])
    sample = load_reference(path, both).sample
    torch.testing.assert_close(sample.moments.mean, rows["a"].mean(0))
    torch.testing.assert_close(sample.part("dinov2").moments.cov, torch.cov(rows["b"].T))
    # In the other order too; and a network that the file has no entry for is not given that of another one.
    swapped = load_reference(path, combine([replace(second, parts={}), replace(first, part="inception")])).sample
    torch.testing.assert_close(swapped.moments.mean, rows["b"].mean(0))
    torch.testing.assert_close(swapped.part("inception").moments.mean, rows["a"].mean(0))
    third = Extractor("own", "OWN", "3" * 64, "tf1", tiny_features, layers={"features": 5}, part="own")
    assert not load_reference(path, combine([first, third])).sample.part("own").has_moments()
    path.write_bytes(pickle.dumps({"num_images": 50, "fid": entries["a"]}))
    with pytest.raises(ValueError, match=r"--reference: .* holds fid; got 'fd_dinov2'"):
        load_reference(path, both)


def test_metrics_of_clip_features_find_them_as_main_ones() -> None:
    """CMMD asks for the layer ``clip``, which is the main one where CLIP is the only extractor."""
    clip = Extractor("clip-small", "CLIP", "c" * 64, "none", tiny_features, part="clip", variant="clip-small-cmmd")
    real, fake = (
        torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(k)), dim=1) for k in (0, 1)
    )
    reference = Reference(Sample(real, moments=moments_of(real)), "r", "a" * 64, 40, "noise")
    found = score(Sample(fake), reference, clip, Bootstrap(4), Metrics(("cmmd",), standard=False))
    assert set(found) == {"cmmd"}
    assert found["cmmd"]["variant"] == "cmmd/rbf-sigma10/x1000/clip-small-cmmd"
    assert found["cmmd"]["value"] == pytest.approx(cmmd(Pair(Sample(real), Sample(fake))), rel=1e-12)


def test_weights_and_rules_of_several() -> None:
    names = ["inception-2015", "dinov2-vit-l-14"]
    assert by_name(names, ["dinov2=b.pth", "a.pth"], "--weights") == {"dinov2-vit-l-14": "b.pth", "inception-2015": "a.pth"}
    assert by_name(names, Path("a=b.pth"), "--weights") == {"inception-2015": "a=b.pth"}
    assert by_name(names, None, "--weights") == {}
    for values in (["a", "b", "c"], ["inception=a", "inception=b"]):
        with pytest.raises(ValueError, match=r"--weights: got .*; one for each, as NAME=VALUE, works"):
            by_name(names, values, "--weights")
    with pytest.raises(ValueError, match="--extractor: got 'x'"):
        load_extractor("builtin/cifar10+x")
