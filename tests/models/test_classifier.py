import hashlib
import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from genkit.models import classifier
from genkit.models.classifier import FORMAT, Classifier, ClassifierConfig, load_builtin, load_classifier

SMALL = ClassifierConfig(channels=(8, 12, 16))
needs_asset = pytest.mark.skipif(not classifier.BUILTIN.is_file(), reason="the built-in classifier is not in this tree")


@pytest.fixture
def net() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(SMALL).eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def write(net: Classifier, path, **changes) -> None:
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    tensors |= changes.pop("tensors", {})
    save_file(tensors, path, {"format": FORMAT, "config": json.dumps(asdict(net.config))} | changes)


def test_shapes_and_types(net, images):
    assert net.features(images).shape == (6, net.feature_size) == (6, 16)
    assert net.logits(images).shape == (6, 10)
    assert net.features(images).dtype == net.logits(images).dtype == torch.float32
    assert net.features(images[:0]).shape == (0, 16)
    assert not net.features(images).requires_grad


def test_logits_are_the_head_of_the_features_over_both_mirror_images(net, images):
    once, mirrored = (net.head(net.features(part)) * SMALL.logit_scale for part in (images, images.flip(3)))
    torch.testing.assert_close(net.logits(images), (once + mirrored) / 2)
    torch.testing.assert_close(net.logits(images), net.logits(images.flip(3)))


def test_float_images_give_the_same_and_carry_gradients(net, images):
    x = (images.float() / 127.5 - 1).requires_grad_()
    torch.testing.assert_close((net(x) + net(x.flip(3))) / 2, net.logits(images))
    (grad,) = torch.autograd.grad(net(x).sum(), x)
    assert grad.abs().sum() > 0


def test_a_row_alone_is_the_row_in_its_batch(net, images):
    together = net.features(images)
    alone = torch.cat([net.features(row[None]) for row in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.features(images.flip(0)), together.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(2, 3, 32, 32), "float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "int64"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"\(2, 32, 32, 3\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "resized"),
        ([1, 2], "list"),
    ],
)
def test_wrong_images_are_named(net, bad, said):
    for method in (net.features, net.logits):
        with pytest.raises(ValueError, match=f"images .*{said}"):
            method(bad)


def test_whitening_makes_patches_white(net, images):
    net.fit_whitening(images, eps=0.0)
    x = (images.float() / 127.5 - 1 - net.mean) / net.std
    h = net.whiten(x)[:, :12].permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(h.T @ h / len(h), torch.eye(12), atol=1e-3, rtol=0)


def test_round_trip_and_fingerprint(net, images, tmp_path):
    write(net, tmp_path / "a.safetensors", test_accuracy="0.5")
    loaded = load_classifier(tmp_path / "a.safetensors")
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert loaded.metadata["test_accuracy"] == "0.5"
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.features(images), net.features(images), rtol=1e-2, atol=1e-2)
    write(net, tmp_path / "b.safetensors", test_accuracy="0.6")
    assert load_classifier(tmp_path / "b.safetensors").fingerprint != loaded.fingerprint


def test_bad_files_are_named(net, tmp_path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError, match=r"bad\.safetensors"):
        load_classifier(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_classifier(path)
    write(net, path, format="something/else")
    with pytest.raises(ValueError, match="something/else"):
        load_classifier(path)
    write(net, path, tensors={"head.bias": torch.full((10,), float("nan"))})
    with pytest.raises(ValueError, match=r"NaN.*head\.bias"):
        load_classifier(path)
    write(net, path, config=json.dumps({"channels": [8, 16, 16]}))
    with pytest.raises(ValueError, match="does not fit"):
        load_classifier(path)
    write(net, path, tensors={"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra"):
        load_classifier(path)


@pytest.mark.parametrize("change", [{"channels": ()}, {"channels": (8,) * 6}, {"mean": (0.0,)}])
def test_impossible_configurations(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ClassifierConfig(**change)


@needs_asset
def test_builtin(images):
    net = load_builtin()
    assert net.features(images).shape == (6, 128)
    assert len(net.fingerprint) == 64
    assert float(net.metadata["test_accuracy_flip"]) >= 0.88  # that of `logits`
    assert net.metadata["test_images"] == "10000"
    assert classifier.BUILTIN.stat().st_size <= 6_000_000


@needs_asset
def test_reference_belongs_to_the_builtin():
    with safe_open(classifier.BUILTIN.with_name("reference.safetensors"), "pt") as file:
        metadata, ref = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert metadata["extractor_sha256"] == load_builtin().fingerprint
    assert (metadata["num_images"], metadata["resize"]) == ("50000", "none")
    assert (ref["mean"].dtype, ref["cov"].dtype, ref["features"].dtype) == (torch.float64, torch.float64, torch.float16)
    assert ref["mean"].shape == (128,)
    assert ref["features"].shape == (10_000, 128)
    torch.testing.assert_close(ref["cov"], ref["cov"].T)
    assert torch.linalg.eigvalsh(ref["cov"]).min() > -1e-12
    kept = ref["features"].double()
    assert ((kept.mean(0) - ref["mean"]).abs() < 6 * (ref["cov"].diagonal() / len(kept)).sqrt()).all()
    torch.testing.assert_close(torch.cov(kept.T).trace(), ref["cov"].trace(), rtol=0.05, atol=0)
