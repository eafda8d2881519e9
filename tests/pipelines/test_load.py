"""Loading: what is written is read back; files that are damaged, foreign or hostile are refused with a reason."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import genkit
from genkit.denoiser import EDMDenoiser
from genkit.models.unet import UNet, UNetConfig
from genkit.pipelines.loading import save_checkpoint

TINY = UNetConfig(image_size=8, num_classes=2, channels=(8,), attention=(), embedding=8, groups=4)


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    model = EDMDenoiser(UNet(TINY), sigma_data=0.4)
    torch.nn.init.normal_(model.network.out.weight, std=0.1)
    return model


@pytest.fixture
def checkpoint(denoiser, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, denoiser, ("no", "yes"), {"images": 12})
    return path


def rewrite(path, weights=None, **metadata):
    """The same file with other weights or metadata."""
    with safe_open(path, framework="pt") as file:
        kept = {**file.metadata(), **metadata}
    save_file(load_file(path) if weights is None else weights, path, metadata={k: v for k, v in kept.items() if v is not None})
    return path


def about(path, **changes):
    with safe_open(path, framework="pt") as file:
        config = {**json.loads(file.metadata()["config"]), **changes}
    return json.dumps({k: v for k, v in config.items() if v is not None})


def test_a_checkpoint_reads_back(denoiser, checkpoint):
    pipe = genkit.load(checkpoint)
    assert (pipe.name, pipe.class_names, pipe.image_shape) == ("tiny", ("no", "yes"), (3, 8, 8))
    assert (pipe.sigma_min, pipe.sigma_max) == (0.002, 80.0)
    loaded = pipe.models["main"]
    assert loaded.sigma_data == 0.4
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for key, value in denoiser.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.half().float())
    assert pipe("yes", 0, 3, steps=2).latents.isfinite().all()


def test_the_fingerprint_is_that_of_the_file(checkpoint, denoiser, tmp_path):
    import hashlib

    first = genkit.load(checkpoint).fingerprint
    assert first == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with torch.no_grad():
        denoiser.network.out.bias += 1
    save_checkpoint(checkpoint, denoiser, ("no", "yes"))
    assert genkit.load(checkpoint).fingerprint != first
    assert list(tmp_path.iterdir()) == [checkpoint]  # no temporary file is left


def test_the_builtin_model():
    pipe = genkit.load("builtin/cifar10")
    assert pipe.name == "builtin/cifar10"
    assert pipe.num_classes == 10
    assert pipe.class_names[8] == "ship"
    assert pipe.image_shape == (3, 32, 32)
    assert len(pipe.fingerprint) == 64


@pytest.mark.parametrize("damage", ["truncated", "half the header", "empty", "text", "pickle", "torch", "flipped header"])
def test_damaged_and_foreign_files(checkpoint, damage):
    data = checkpoint.read_bytes()

    class Hostile:
        def __reduce__(self):
            return (checkpoint.with_name("ran").write_text, ("code ran",))

    broken = {
        "truncated": data[: len(data) * 2 // 3],
        "half the header": data[:50],
        "empty": b"",
        "text": b"not a model at all\n" * 100,
        "pickle": pickle.dumps({"a": 1}),
        "flipped header": data[:8] + bytes([data[8] ^ 0xFF]) + data[9:],
    }
    if damage == "torch":
        torch.save({"weights": Hostile()}, checkpoint)
    else:
        checkpoint.write_bytes(broken[damage])
    with pytest.raises(
        ValueError, match=r"model='.*tiny.safetensors' cannot be read as safetensors .* damaged or of another format"
    ):
        genkit.load(checkpoint)
    assert not checkpoint.with_name("ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint, value):
    weights = load_file(checkpoint)
    key = sorted(weights)[-1]
    weights[key].view(-1)[0] = value
    rewrite(checkpoint, weights)
    with pytest.raises(
        ValueError, match=rf"model=.*weight '{key}' holds NaN or infinity; the file is damaged or the training diverged"
    ):
        genkit.load(checkpoint)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_network(checkpoint, change):
    weights = load_file(checkpoint)
    if change == "missing":
        del weights["network.out.bias"]
    elif change == "extra":
        weights["network.more"] = torch.zeros(1)
    else:
        weights["network.out.bias"] = torch.zeros(5)
    rewrite(checkpoint, weights)
    name = "network.more" if change == "extra" else "network.out.bias"
    with pytest.raises(ValueError, match=f"model=.*1 weights do not fit the network it describes, first {name}"):
        genkit.load(checkpoint)


@pytest.mark.parametrize("found", ["someone-elses-1", None])
def test_other_formats(checkpoint, found):
    rewrite(checkpoint, format=found)
    with pytest.raises(ValueError, match=f"says format={found!r}; this loader reads 'genkit-edm-unet-1'"):
        genkit.load(checkpoint)


@pytest.mark.parametrize("config", [None, "{", "[]", "3", '"x"', "null"])
def test_damaged_metadata(checkpoint, config):
    rewrite(checkpoint, config=config)
    with pytest.raises(ValueError, match=r"model=.*its metadata (is damaged|lacks)"):
        genkit.load(checkpoint)


@pytest.mark.parametrize("key", ["network", "sigma_data", "sigma_min", "sigma_max", "class_names"])
def test_metadata_that_lacks_something(checkpoint, key):
    rewrite(checkpoint, config=about(checkpoint, **{key: None}))
    with pytest.raises(ValueError, match=f"model=.*its metadata lacks {key}"):
        genkit.load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"chanels": [8]}},
        {"network": {"channels": [7]}},
        {"network": "unet"},
        {"network": {"channels": 8}},
        {"sigma_data": "half"},
        {"sigma_data": [0.5]},
    ],
    ids=str,
)
def test_descriptions_that_fit_no_network(checkpoint, changes):
    rewrite(checkpoint, config=about(checkpoint, **changes))
    with pytest.raises(ValueError, match=r"model=.*its network description does not fit this version of genkit"):
        genkit.load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma_min": "low"},
        {"sigma_max": None, "sigma_max_": 1},
        {"class_names": ["only one"]},
        {"class_names": 5},
        {"sigma_min": 90.0},
    ],
    ids=str,
)
def test_metadata_that_contradicts_itself(checkpoint, changes):
    rewrite(checkpoint, config=about(checkpoint, **changes))
    with pytest.raises(ValueError, match=r"model=.*its metadata"):
        genkit.load(checkpoint)


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(
        ValueError, match=r"model='builtin/cifar100' is not a built-in model; use one of builtin/cifar10, .*, or a path"
    ):
        genkit.load("builtin/cifar100")
    for path in (tmp_path / "none.safetensors", tmp_path, ""):
        with pytest.raises(
            FileNotFoundError, match=r"model=.* is not a file; give a .safetensors checkpoint or one of builtin/cifar10"
        ):
            genkit.load(path)
