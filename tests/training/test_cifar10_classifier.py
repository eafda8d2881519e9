import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genkit.models.classifier import ClassifierConfig, load_classifier
from genkit.training import cifar10_classifier as recipe_module
from genkit.training.cifar10_classifier import Batches, Recipe, learning_rate, trainer
from genkit.training.cifar10_classifier_export import first_of_each, statistics
from genkit.training.cifar10_data import load_split
from genkit.training.common import Trainer

EXPORT = recipe_module.export
TINY = ClassifierConfig(channels=(4, 8, 8))
SHORT = Recipe(cycles=(64,), batch=16)


def jpeg(pixels: np.ndarray) -> tuple[bytes, bytes]:
    """Header (up to and with the scan header) and scan of one picture, without the end marker."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    raw = file.getvalue()
    scan = raw.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(raw[scan + 2 : scan + 4], "big")
    return raw[:start], raw[start:-2]


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """40 + 20 pictures, class c of brightness 20 c plus noise, in the layout of the real pack."""
    rng, arrays, header = np.random.default_rng(0), {}, b""
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 10
        pixels = np.clip(20 * labels[:, None, None, None] + rng.integers(0, 60, (count, 32, 32, 3)), 0, 255).astype(np.uint8)
        header, scans = jpeg(pixels[0])[0], [jpeg(p)[1] for p in pixels]
        arrays |= {f"{split}_data": np.frombuffer(b"".join(scans), np.uint8), f"{split}_label": labels.astype(np.uint8)}
        arrays[f"{split}_len"] = np.array([len(s) for s in scans], np.uint16)
    path = tmp_path_factory.mktemp("pack") / "pack.npz"
    np.savez(path, header=np.frombuffer(header, np.uint8), classes=np.array(list("abcdefghij")), **arrays)
    return path


@pytest.fixture(scope="session")
def data(pack):
    return load_split(pack, "train")


def state(run: Trainer) -> dict[str, torch.Tensor]:
    net = {f"net.{k}": v for k, v in run.plain().state_dict().items()}
    return net | {f"ema.{k}": v for k, v in run.ema.state_dict().items()}


def test_the_pack_is_read(data):
    images, labels = data
    assert images.shape == (40, 3, 32, 32)
    brightness = images.float().mean((1, 2, 3))
    assert (brightness[labels == 9] > brightness[labels == 0].max()).all()


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(data, tmp_path):
    images, labels = data
    whole = trainer(TINY, SHORT, tmp_path / "whole", images)
    whole.run(Batches(images, labels, SHORT))
    stopped = trainer(TINY, SHORT, tmp_path / "stopped", images)
    stopped.train_step(Batches(images, labels, SHORT))
    stopped.save()
    resumed = trainer(TINY, SHORT, tmp_path / "stopped", images)
    assert (whole.step, resumed.step) == (4, 1)
    resumed.run(Batches(images, labels, SHORT))
    expected = state(whole)
    assert all(torch.equal(v, expected[k]) for k, v in state(resumed).items())


def test_batches_depend_on_seed_and_step_only(data):
    a, b, other = (Batches(*data, Recipe(cycles=(64,), batch=16, seed=s)) for s in (0, 0, 1))
    [b(s) for s in (0, 1)]
    assert torch.equal(a(5)[0], b(5)[0])
    assert not torch.equal(a(5)[0], other(5)[0])
    halves = [a(3, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([x for x, _ in halves]), a(3)[0])
    assert torch.equal(torch.cat([y for _, y in halves]), a(3)[1])


def test_every_picture_is_seen_once_an_epoch_and_flips_alternate(data):
    images, labels = data
    batches = Batches(images, labels, Recipe(batch=20, shift=0))
    assert sorted(torch.cat([batches.indices(s) for s in (0, 1)]).tolist()) == list(range(40))
    seen = {}
    for step in range(4):
        for i, x in zip(batches.indices(step).tolist(), batches(step)[0], strict=True):
            seen[i, step // 2] = bool(torch.equal(x, images[i] / 127.5 - 1))
    assert all(seen[i, 0] != seen[i, 1] for i in range(40))


def test_translation_keeps_the_pixels(data):
    images, labels = data
    x, y = Batches(images, labels, Recipe(batch=40, shift=2))(0)
    assert x.shape == (40, 3, 32, 32)
    assert x.min() >= -1
    assert x.max() <= 1
    for c in range(10):
        assert (x[y == c].mean() - (images[labels == c] / 127.5 - 1).mean()).abs() < 0.05


def test_a_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(ValueError, match="batch=64: use 1 to 40"):
        Batches(*data, Recipe(batch=64))


def test_learning_rate_is_a_triangle_in_every_cycle():
    r = Recipe(cycles=(1000, 495), batch=10, lr=1.0, warmup=0.2)
    assert r.steps == 150
    rates = [learning_rate(s, r) for s in range(100)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 19
    assert 0 < rates[0] <= 0.05
    assert 0 < rates[-1] <= 0.02
    assert [learning_rate(s, r) for s in (100, 109, 149, 150)] == pytest.approx([0.1, 1.0, 0.025, 0.0])
    with pytest.raises(ValueError, match=r"cycles=\(\)"):
        Recipe(cycles=())


def test_training_leaves_the_global_generator_alone(data, tmp_path):
    before = torch.get_rng_state()
    trainer(TINY, SHORT, tmp_path, data[0]).train_step(Batches(*data, SHORT))
    assert torch.equal(before, torch.get_rng_state())


def test_statistics_are_those_of_numpy():
    f = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    mean, cov = statistics(f)
    np.testing.assert_allclose(mean, f.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(f.double().numpy().T), rtol=1e-10)


def test_first_of_each():
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    assert first_of_each(labels, 2).tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="count=4"):
        first_of_each(labels, 4)


def test_command_trains_and_exports(pack, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe_module, "export", lambda *a, **k: EXPORT(*a, **k, per_class=2))
    argv = ["--data", str(pack), "--out", str(tmp_path / "run"), "--export", str(tmp_path / "assets")]
    recipe_module.main([*argv, "--channels", "4", "8", "8", "--cycles", "32", "16", "--batch", "16", "--hardware", "a test"])
    assert "test accuracy" in capsys.readouterr().out
    net = load_classifier(tmp_path / "assets" / "classifier.safetensors")
    assert (net.metadata["steps"], net.metadata["hardware"], net.metadata["test_images"]) == ("3", "a test", "20")
    assert 0 <= float(net.metadata["test_accuracy"]) <= 1
    assert json.loads(net.metadata["recipe"])["batch"] == 16
    reference = load_file(tmp_path / "assets" / "reference.safetensors")
    images, labels = load_split(pack, "train")
    features = net.features(images)
    torch.testing.assert_close(reference["mean"], features.double().mean(0))
    torch.testing.assert_close(reference["cov"], torch.cov(features.double().T))
    torch.testing.assert_close(reference["features"], features[first_of_each(labels, 2)].half())
