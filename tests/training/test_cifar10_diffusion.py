"""The diffusion recipe on a tiny set: it learns, it is a function of its seed, and it resumes bit for bit."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.denoiser import EDMDenoiser
from genkit.models.unet import UNet, UNetConfig
from genkit.pipelines.loading import load_checkpoint
from genkit.training import cifar10_diffusion
from genkit.training.cifar10_data import load_split
from genkit.training.cifar10_diffusion import Batches, Recipe, edm_loss, keep_weak, main, trainer
from genkit.training.common import learning_rate, update_ema

TINY = UNetConfig(patch=4, channels=(8, 8), attention=(), embedding=16, groups=4)
RECIPE = Recipe(images=48, batch=8, warmup=16, weak_at=0.5)


def scan_of(pixels):
    """JPEG header and scan of one picture; pictures of one size and quality share the header."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    data = file.getvalue()
    cut = data.index(b"\xff\xda")
    cut += 2 + int.from_bytes(data[cut + 2 : cut + 4], "big")
    assert data.endswith(b"\xff\xd9")
    return data[:cut], data[cut:-2]


@pytest.fixture(scope="module")
def arrays():
    """A pack of 20 + 10 pictures, class c a flat colour that brightens with c."""
    out = {}
    for split, count in (("train", 20), ("test", 10)):
        labels = np.arange(count) % 10
        scans = [scan_of(np.full((32, 32, 3), 20 + 22 * c, np.uint8)) for c in labels]
        out["header"] = np.frombuffer(scans[0][0], np.uint8)
        out[f"{split}_data"] = np.frombuffer(b"".join(s for _, s in scans), np.uint8)
        out[f"{split}_len"] = np.array([len(s) for _, s in scans], np.uint16)
        out[f"{split}_label"] = labels.astype(np.uint8)
    return out


@pytest.fixture(scope="module")
def pack(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pack.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def data(pack):
    return load_split(pack, "train")


def batches(data, recipe=RECIPE):
    return Batches(*data, recipe, 10)


def state(run):
    moments = {f"{i}.{k}": v for i, s in run.optimizer.state_dict()["state"].items() for k, v in s.items()}
    return [run.plain().state_dict(), run.ema.state_dict(), moments]


def assert_same(a, b):
    for left, right in zip(state(a), state(b), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)


# ---- data ----


def test_the_pack_is_decoded(data):
    images, labels = data
    assert (images.shape, images.dtype) == ((20, 3, 32, 32), torch.uint8)
    assert labels.tolist() == list(range(10)) * 2
    expected = (20 + 22 * labels)[:, None, None, None].float()
    assert (images.float() - expected).abs().max() <= 2


def test_a_pack_that_lacks_something_is_named(arrays, tmp_path):
    path = tmp_path / "pack.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if key != "train_label"})
    with pytest.raises(ValueError, match=r"data='.*' cannot be read: it lacks the keys \['train_label'\]"):
        load_split(path, "train")


def test_a_missing_pack_and_split_are_named(pack, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data='.*none.npz' is not a file"):
        load_split(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="split='valid': use 'train' or 'test'"):
        load_split(pack, "valid")


# ---- batches ----


def test_a_batch_is_a_function_of_seed_and_step(data):
    forward, backward = batches(data), batches(data)
    ahead = [forward(k) for k in range(5)]
    for k in reversed(range(5)):
        assert all(torch.equal(a, b) for a, b in zip(ahead[k], backward(k), strict=True))
    other = batches(data, Recipe(images=48, batch=8, seed=1))(0)
    assert not torch.equal(ahead[0][3], other[3])
    assert not torch.equal(ahead[0][3], ahead[1][3])


def test_an_epoch_shows_no_image_twice(data):
    b = batches(data)
    for epoch in range(3):
        seen = torch.cat([b.indices(2 * epoch + k) for k in range(2)])
        assert len(seen.unique()) == 16
    assert not torch.equal(b.indices(0), b.indices(2))


def test_processes_share_a_batch(data):
    whole, b = batches(data)(3), batches(data)
    for i, part in enumerate(zip(*(b(3, rank, 4) for rank in range(4)), strict=True)):
        assert torch.equal(torch.cat(part), whole[i])


def test_the_laws_of_a_batch(data):
    images = torch.zeros(4000, 3, 2, 2, dtype=torch.uint8)
    images[..., 1] = 255
    b = Batches(images, torch.full((4000,), 7), Recipe(images=4000, batch=4000, label_dropout=0.1), 10)
    x, y, sigma, noise = b(0)
    assert (x.min(), x.max()) == (-1, 1)
    flipped = x[:, 0, 0, 0] == 1
    assert torch.equal(x[flipped][:, :, :, 1], -torch.ones_like(x[flipped][:, :, :, 1]))
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert set(y.tolist()) == {7, 10}
    assert (y == 10).float().mean().item() == pytest.approx(0.1, abs=0.025)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.08)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.06)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)


# ---- formulas ----


def test_the_loss_weighs_the_network_output_equally():
    """EDM: with D = c_skip x + c_out F the weighted loss is |F - F_target|^2, whatever the noise level."""
    g = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 4, 3, 8, 8, generator=g)
    sigma, sd = torch.tensor([0.01, 0.3, 2.0, 50.0]), 0.5
    denoiser = EDMDenoiser(lambda z, c_noise, y: torch.zeros_like(z), sd)
    s = sigma[:, None, None, None]
    target = (x - sd**2 / (s**2 + sd**2) * (x + s * n)) / (s * sd / (s**2 + sd**2).sqrt())
    loss = edm_loss(denoiser, x, torch.zeros(4).long(), sigma, n, sd)
    assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize(("seen", "share"), [(0, 0.1), (4, 0.5), (10, 1.0), (64, 1.0), (80, 20 / 35), (98, 2 / 35), (100, 0.0)])
def test_learning_rate(seen, share):
    """Up over 10 images, level, down to 0 over the last 35 of 100."""
    assert learning_rate(seen, Recipe(images=100, batch=1, lr=2.0, warmup=10, decay=0.35)) == pytest.approx(2 * share)


def test_ema_has_the_half_life_it_says():
    """After the images of one half-life the old weights count half."""
    recipe = Recipe(batch=10, ema_halflife=0.05)
    old, new = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    start = old.weight.clone()
    for _ in range(5):
        update_ema(old, new, 1000, recipe)  # half-life: 50 images, five batches
    torch.testing.assert_close(old.weight, (start + new.weight) / 2)
    update_ema(old, new, 0, recipe)
    torch.testing.assert_close(old.weight, new.weight)


# ---- runs ----


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    whole = trainer(TINY, RECIPE, tmp_path / "whole")
    whole.run(batches(data))
    assert (whole.step, whole.seen) == (6, 48)
    stopped = trainer(TINY, RECIPE, tmp_path / "stopped")
    for _ in range(4):
        stopped.train_step(batches(data))
        keep_weak(stopped)
    stopped.save()
    resumed = trainer(TINY, RECIPE, tmp_path / "stopped")
    torch.manual_seed(123)  # the global generator plays no part
    assert resumed.step == 4
    assert_same(resumed, stopped)
    resumed.run(batches(data))
    assert_same(resumed, whole)
    again = trainer(TINY, RECIPE, tmp_path / "stopped")
    again.run(batches(data))  # finished: nothing is done again
    assert_same(again, whole)


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_gone_on_from(data, tmp_path):
    """As the first ones were: without ``made_of`` and ``history``."""
    whole = trainer(TINY, RECIPE, tmp_path / "whole")
    whole.run(batches(data))
    stopped = trainer(TINY, RECIPE, tmp_path / "stopped")
    stopped.train_step(batches(data))
    stopped.save()
    file = tmp_path / "stopped" / "checkpoint.pt"
    kept = torch.load(file, weights_only=True)
    torch.save({name: kept[name] for name in ("net", "ema", "step", "optimizer", "seconds")}, file)
    resumed = trainer(TINY, RECIPE, tmp_path / "stopped")
    resumed.run(batches(data))
    assert_same(resumed, whole)
    assert [part["from_image"] for part in resumed.history] == [8]


def test_the_weak_snapshot_is_the_average_at_its_step(data, tmp_path):
    run = trainer(TINY, RECIPE, tmp_path)
    for _ in range(3):
        run.train_step(batches(data))
    early = {k: v.clone() for k, v in run.ema.state_dict().items()}
    run = trainer(TINY, RECIPE, tmp_path)
    run.run(batches(data))
    weak = torch.load(tmp_path / "weak.pt", weights_only=True)
    assert weak["seen"] == 24
    assert all(torch.equal(weak["ema"][k], early[k]) for k in early)
    assert any(not torch.equal(run.ema.state_dict()[k], early[k]) for k in early)


def test_it_learns(data, tmp_path):
    """On one and the same noisy batch, whose images were shown about forty times in between."""
    recipe = Recipe(images=16 * 50, batch=16, warmup=32, lr=1e-2)
    run, b = trainer(TINY, recipe, tmp_path), batches(data, recipe)

    def loss(net):
        with torch.no_grad():
            return edm_loss(net, *b(1000), recipe.sigma_data).item()

    before = loss(run.net)
    run.run(b)
    assert loss(run.net) < 0.8 * before
    assert loss(run.ema) < 0.8 * before


def test_the_network_is_a_function_of_the_seed(tmp_path):
    a, b, c = (trainer(TINY, Recipe(seed=s), tmp_path).plain().state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    assert isinstance(trainer(TINY, RECIPE, tmp_path).plain().network, UNet)


def test_the_command(pack, tmp_path):
    options = ["--images", "16", "--batch", "8", "--channels", "16", "16", "--seed", "3"]
    cifar10_diffusion.main(["--data", str(pack), "--out", str(tmp_path / "run"), *options])
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["recipe"]["seed"] == 3
    assert record["made_of"]["network"]["channels"] == [16, 16]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    with pytest.raises(FileNotFoundError, match="data="):
        cifar10_diffusion.main(["--data", str(tmp_path / "no.npz"), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "lengths"])
def test_a_damaged_pack_is_named(arrays, tmp_path, damage):
    path = tmp_path / "pack.npz"
    if damage == "lengths":
        arrays = {**arrays, "train_len": arrays["train_len"] + 1}
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if damage == "garbage":
        path.write_bytes(b"no pack at all")
    with pytest.raises(ValueError, match=r"data='.*pack.npz' cannot be read"):
        load_split(path, "train")


def test_a_changed_recipe_is_recorded(arrays, tmp_path):
    """A run whose total is changed on its way says so in its history, and in the exported weights."""
    np.savez(tmp_path / "pack.npz", **arrays)
    common = ["--data", str(tmp_path / "pack.npz"), "--out", str(tmp_path / "run"), "--channels", "16", "--batch", "10"]
    main([*common, "--images", "10"])
    main([*common, "--images", "30", "--export", str(tmp_path / "assets"), "--hardware", "a test"])
    about = load_checkpoint(tmp_path / "assets" / "diffusion.safetensors")[1]
    assert [(part["from_image"], part["recipe"]["images"]) for part in about["history"]] == [(0, 10), (10, 30)]
    assert about["images"] == 30
    assert about["hardware"] == "a test"
    weak = load_checkpoint(tmp_path / "assets" / "diffusion_weak.safetensors")[1]
    assert weak["images"] == 10
    with pytest.raises(ValueError, match="holds a run of another network"):
        main([*common, "--channels", "32", "--images", "40"])
    with pytest.raises(ValueError, match="batch=21: use 1 to 20"):
        main([*common, "--out", str(tmp_path / "other"), "--batch", "21"])
