"""Extractors: the call, the Inception of 2015 against torch-fidelity's, and networks of one's own."""

from __future__ import annotations

import zlib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval.blocks import Block, BlockStore
from genkit_eval.errors import InputError
from genkit_eval.extractors import EXTRACTORS, Extractor, Options, custom, from_module, inception, load_extractor
from genkit_eval.metrics import METRICS
from safetensors import safe_open
from torch import Tensor, nn

from tests.eval.standins import FakePipeline, Runner, tiny_features

GOLDEN = Path(__file__).parents[1] / "golden" / "eval" / "extractors"


def noise(n: int, *shape: int) -> Tensor:
    return torch.randint(256, (n, 3, *shape), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


# The call


def test_one_layer_or_several() -> None:
    pixels = noise(7, 8, 8)
    one = Extractor("a", "A", "0" * 64, "none", tiny_features, batch=3)
    assert list(one(pixels)) == ["features"]
    assert one(pixels)["features"].equal(tiny_features(pixels))
    several = Extractor(
        "a", "A", "0" * 64, "none", lambda x: {"features": tiny_features(x), "wide": x.flatten(1).double()}, batch=3
    )
    found = several(pixels)
    assert found["wide"].dtype == torch.float32
    assert found["wide"].equal(pixels.flatten(1).float())


def test_no_gradient_inside_and_none_forbidden_outside() -> None:
    weight = nn.Parameter(torch.ones(3 * 64, 2))
    features = Extractor("a", "A", "0" * 64, "none", lambda x: x.float().flatten(1) @ weight)(noise(2, 8, 8))["features"]
    assert not features.requires_grad
    scale = torch.ones(2, requires_grad=True)
    (features * scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("pixels", [torch.zeros(2, 3, 8, 8), noise(2, 8, 8)[0], noise(2, 8, 8)[:, :1], noise(2, 8, 8)[:0]])
def test_pixels_that_are_none(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^pixels: got torch\..*; uint8 \(N, 3, H, W\) works"):
        Extractor("a", "A", "0" * 64, "none", tiny_features)(pixels)


def test_images_of_another_size() -> None:
    takes = Extractor("a", "A", "0" * 64, "none", tiny_features, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"got images of \(3, 8, 9\); extractor a takes \(3, 8, 8\)"):
        takes(noise(1, 8, 9))


def test_the_builtin_network_has_no_options() -> None:
    found = load_extractor("builtin/cifar10")
    assert found(noise(2, 32, 32))["features"].shape == (2, found.layers["features"])
    assert found.variant == "cifar10"
    for option, more in (("--weights", {"weights": Path("x")}), ("--resize", {"resize": "tf1"})):
        with pytest.raises(InputError, match=f"{option}: .* leave it out"):
            load_extractor("builtin/cifar10", **more)


# The Inception of 2015


def seeded(key: str, shape: list[int]) -> Tensor:
    """Weights that keep activations of one size, the same on every machine: He for convolutions, batch norms near one."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        return torch.rand(shape, generator=generator) + 0.5
    values = torch.randn(shape, generator=generator)
    if key.endswith("bn.weight"):
        return 1 + 0.1 * values
    if key.endswith(("running_mean", "bias")):
        return 0.1 * values
    return values * (2 / torch.Size(shape[1:]).numel()) ** 0.5


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """All 566 keys of the published file, as torch-fidelity's network names them, with seeded values."""
    lines = [str(line).rpartition(" ") for line in np.load(GOLDEN / "inception.npz")["keys"]]
    return {key: seeded(key, [int(n) for n in shape.split(",") if n]) for key, _, shape in lines}


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def ours(weights: Path) -> Extractor:
    return load_extractor("inception-2015", weights=weights, any_weights=True)


@pytest.mark.parametrize("layer", ["features", "spatial", "logits"])
def test_inception_is_torch_fidelitys(layer: str, ours: Extractor) -> None:
    """Its features of two images of 64x96 with these weights; ``spatial`` by a hook on Mixed_6d.branch1x1, channels last."""
    golden = np.load(GOLDEN / "inception.npz")
    found = ours(torch.from_numpy(golden["pixels"]))[layer]
    expected = torch.from_numpy(golden[layer])
    assert found.shape == (2, ours.layers[layer])
    # Batch norms are folded into the convolutions here, and applied after them there.
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((expected[0] - expected[1]).norm() / expected.norm()) > 0.1  # two different images


def test_folding_is_the_batch_norm(state: dict[str, Tensor]) -> None:
    name = "Mixed_5b.branch5x5_2"
    x = torch.randn(1, 48, 9, 9, generator=torch.Generator().manual_seed(0))
    folded = inception.fold(state)
    got = nn.functional.conv2d(x, folded[f"{name}.weight"], folded[f"{name}.bias"])
    norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    plain = nn.functional.batch_norm(nn.functional.conv2d(x, state[f"{name}.conv.weight"]), *norm, eps=1e-3)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


def test_older_files_lack_the_counters(state: dict[str, Tensor]) -> None:
    inception.load_state({key: value for key, value in state.items() if "num_batches_tracked" not in key})


def test_the_file_of_another_network(state: dict[str, Tensor], tmp_path: Path) -> None:
    one = next(iter(state))
    for other in (
        {key: value for key, value in state.items() if not key.startswith("Mixed_7c.branch_pool")},
        {key: value for key, value in state.items() if key != "Mixed_7c.branch_pool.bn.bias"},
        {
            **state,
            "AuxLogits.conv0.conv.weight": state[one],
            **{key.replace("Conv2d_1a_3x3", "AuxLogits.conv0"): value for key, value in state.items() if "1a_3x3" in key},
        },
        {**state, "fc.weight": torch.zeros(1000, 2048)},
    ):
        with pytest.raises(ValueError, match="not the Inception of 2015"):
            inception.load_state(other)
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"--weights: .*x\.pth: not the Inception of 2015 in the layout of torch-fidelity"):
        load_extractor("inception-2015", weights=tmp_path / "x.pth", any_weights=True)


def test_other_weights_are_refused_or_never_called_fid(ours: Extractor, weights: Path) -> None:
    with pytest.raises(
        InputError, match=f"--weights: .* has sha256 {ours.sha256}, but .* has {inception.WEIGHTS.sha256}; .*any-weights"
    ):
        load_extractor("inception-2015", weights=weights)
    mark = f"@{ours.sha256[:8]}"
    assert (ours.name, ours.variant) == (f"inception-2015{mark}", f"adm-tf1{mark}")
    assert METRICS["frechet"].heading(ours) == f"FD-other-Inception{mark}"


def test_the_published_file_is_fid_and_each_rule_a_protocol(
    ours: Extractor, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "WEIGHTS", inception.WEIGHTS.__class__("w.pth", "file:///absent", ours.sha256))
    pixels = torch.from_numpy(np.load(GOLDEN / "inception.npz")["pixels"])[1:]
    clean = load_extractor("inception-2015", weights=weights, resize="clean")
    assert (clean.name, clean.resize, clean.variant) == ("inception-2015", "clean", "clean")
    assert METRICS["frechet"].heading(clean) == "FID-clean"
    adm = load_extractor("inception-2015", weights=weights, resize="adm")
    assert (adm.resize, adm.variant, METRICS["frechet"].heading(adm)) == ("tf1", "adm-tf1", "FID")
    far = float((clean(pixels)["features"] - adm(pixels)["features"]).abs().max())
    assert far > 1e-3  # another rule, other features
    with pytest.raises(InputError, match="--resize: got 'pil'; extractor inception-2015 takes tf1, clean, torch-bilinear"):
        load_extractor("inception-2015", weights=weights, resize="pil")


# Your own network


class Mean(nn.Module):
    """Mean and spread of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.gain * torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1))


def test_a_module() -> None:
    pixels = noise(5, 8, 8)
    found = from_module(Mean(), "mine", label="MINE")
    expected = 2 * (pixels.float() / 255).mean(dim=(2, 3))
    torch.testing.assert_close(found(pixels)["features"][:, :3], expected)
    assert (found.resize, found.variant, found.label) == ("none", "mine-none", "MINE")
    sized = from_module(Mean(), "mine", size=16, resize="tf1", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    grey = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(sized(grey)["features"], torch.tensor([[2.0, 2, 2, 0, 0, 0]]))
    assert sized.variant == "mine-tf1"
    changed = Mean()
    with torch.no_grad():
        changed.gain.add_(1)
    assert len({found.sha256, sized.sha256, from_module(changed, "mine").sha256}) == 3
    assert from_module(Mean(), "mine").sha256 == found.sha256
    with pytest.raises(InputError, match="--resize: got 'bilinear'; one of tf1, clean"):
        from_module(Mean(), "mine", size=16, resize="bilinear")


def test_a_module_that_returns_something_else() -> None:
    with pytest.raises(ValueError, match=r"extractor flat returned \(2, 3, 8, 8\) for 2 images; \(B, D\)"):
        from_module(nn.Identity(), "flat")(noise(2, 8, 8))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "from genkit_eval.extractors import Extractor\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1)\n"
        "def plain():\n"
        "    return Net()\n"
        "def own(options):\n"
        "    return Extractor('own', 'OWN', 'f' * 64, options.resize or 'none', lambda x: x.flatten(1), device=options.device)\n"
        "def number():\n"
        "    return 3\n"
        "def broken():\n"
        "    raise RuntimeError('no network today')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_networks"


def test_package_and_factory(plugin: str) -> None:
    found = load_extractor(f"{plugin}:plain")
    assert found(noise(2, 4, 4))["features"].shape == (2, 48)
    assert found.name == f"{plugin}:plain"
    assert load_extractor(f"{plugin}:Net")(noise(2, 4, 4))["features"].equal(found(noise(2, 4, 4))["features"])
    assert load_extractor(f"{plugin}:own", resize="clean").resize == "clean"


def test_an_entry_point(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("mine", f"{plugin}:own", custom.GROUP)]
    monkeypatch.setattr(custom, "entry_points", lambda group: points if group == custom.GROUP else [])
    assert load_extractor("mine").label == "OWN"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("{}:absent", {}, "--extractor: .*:absent cannot be loaded .*AttributeError"),
        ("no_such_package:x", {}, "cannot be loaded .ModuleNotFoundError"),
        ("{}:broken", {}, "cannot be loaded .RuntimeError: no network today"),
        ("{}:number", {}, "made a int; an nn.Module or an Extractor works"),
        ("{}:plain", {"weights": Path("x")}, "--weights: .* makes a module with weights of its own"),
        ("{}:plain", {"resize": "clean"}, "--resize: got 'clean'; .* has the rule 'none', leave it out"),
        (
            "inceptoin",
            {},
            "--extractor: got 'inceptoin'; one of builtin/cifar10, inception-2015, .*; *|or package.module:factory",
        ),
    ],
)
def test_factories_that_do_not_work(name: str, more: dict[str, Any], message: str, plugin: str) -> None:
    with pytest.raises(InputError, match=message):
        load_extractor(name.format(plugin), **more)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(options: Options) -> Extractor:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setitem(EXTRACTORS, "needs", lacking)
    with pytest.raises(InputError, match="needs: No module named 'transformers'; pip install"):
        load_extractor("needs")


# Layers in blocks


def layered(pixels: Tensor) -> dict[str, Tensor]:
    return {"features": tiny_features(pixels), "logits": pixels.float().mean(dim=(2, 3))}


def test_blocks_keep_every_layer(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "c" * 64)
    for index, n in enumerate((4, 3)):
        pixels = noise(n, 8, 8)
        layers = layered(pixels)
        store.write(
            index, Block(layers.pop("features"), pixels, torch.arange(n), torch.ones(n).long(), 1.0, 1.0, 1, [], [], layers)
        )
    whole = store.read_all(6, 4)
    assert whole.layers["logits"].equal(torch.cat([layered(noise(n, 8, 8))["logits"] for n in (4, 3)])[:6])
    assert whole.features.shape == (6, 5)


def test_a_run_stores_the_main_layer_and_the_others(runner: Runner) -> None:
    several = Extractor("fake/layers", "TINY", "e" * 64, "none", layered)
    Runner(several, runner.reference, runner.out)(FakePipeline(), "none", n=10)
    path = next(runner.out.glob("*/blocks/00000.safetensors"))
    with safe_open(path, "pt") as file:
        pixel_layers = {f"layer.pixels.{name}" for name in ("saturation", "contrast", "clipped")}
        assert set(file.keys()) == {"features", "layer.logits", "pixels", "labels", "nfe"} | pixel_layers
        assert file.get_tensor("layer.logits").equal(file.get_tensor("pixels").float().mean(dim=(2, 3)))


def test_a_layer_that_is_not_finite(runner: Runner) -> None:
    broken = Extractor(
        "a", "A", "e" * 64, "none", lambda x: {"features": tiny_features(x), "logits": torch.full((len(x), 2), torch.nan)}
    )
    with pytest.raises(InputError, match="features of images 0 to 9 are not finite"):
        Runner(broken, runner.reference, runner.out)(FakePipeline(), "none")
