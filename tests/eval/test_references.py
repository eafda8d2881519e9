"""References: built from images, kept in a cache, read from and written for other tools, refused where they do not fit."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.extractors.weights import sha256_of
from genkit_eval.images import Images, open_images
from genkit_eval.metrics import Sample
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.moments import Moments, moments_of
from genkit_eval.references import Contents, Layer, Work, build, load_reference, read_contents, write_npz, write_safetensors
from genkit_eval.references import features as features_module
from genkit_eval.references.build import sample_of
from genkit_eval.references.foreign import read_pkl
from genkit_eval.references.safepickle import load_numbers, load_torch
from PIL import Image
from torch import Tensor

FORMATS = Path(__file__).parents[1] / "golden" / "eval" / "formats"
EXPECTED = json.loads((FORMATS / "expected.json").read_text())
TOTAL, WIDTH = 11, 4
WEIGHTS = torch.randn(3 * 6 * 6, WIDTH + 20, generator=torch.Generator().manual_seed(5))


class Network:
    """Two layers of a random projection; counts its images and may stop."""

    def __init__(self, stop_after: int | None = None, error: BaseException | None = None) -> None:
        self.seen, self.stop_after, self.error = 0, stop_after, error or KeyboardInterrupt()

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise self.error
        self.seen += len(pixels)
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 6)
        found = torch.stack([image.flatten() @ WEIGHTS for image in pooled])
        return {"features": found[:, :WIDTH], "spatial": found[:, WIDTH:]}


def extractor_of(network: Callable[[Tensor], Any], **more: Any) -> Extractor:
    known: dict[str, Any] = {"layers": {"features": WIDTH, "spatial": 20}, "resize": "tf1"} | more
    return Extractor("fake/two-layers", "TWO", "c" * 64, features=network, **known)


@pytest.fixture
def extractor() -> Extractor:
    return extractor_of(Network())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for k in range(TOTAL):
        pixels = np.random.default_rng(k).integers(0, 256, (6 + k % 2, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k:02d}.png")
    return root


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 4)


def direct(images: Images) -> dict[str, Tensor]:
    network = Network()
    parts = [network(pixels[None]) for batch in images.batches(1) for pixels in batch.pixels]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_build_takes_moments_of_every_layer_and_a_sample_of_features(folder: Path, extractor: Extractor) -> None:
    images = open_images(str(folder))  # two sizes, so that batches are split by size
    contents = build(images, extractor, Work(batch=3), num_features=6)
    for name, values in direct(images).items():
        found = contents.layers[name].moments
        assert found is not None
        np.testing.assert_allclose(found.mean, values.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.cov, np.cov(values.double().numpy(), rowvar=False), atol=1e-12)
    chosen = sample_of(TOTAL, 6)
    assert len(set(chosen)) == 6
    assert torch.equal(contents.layers["features"].features, direct(images)["features"][chosen])
    about = contents.about
    assert (about["num_images"], about["features_of"]) == ("11", "6 images drawn with seed 0")
    assert (about["extractor_sha256"], about["resize"], about["dataset_sha256"]) == ("c" * 64, "tf1", images.fingerprint)


def test_moments_far_from_zero_lose_no_digits() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e4
    sums = features_module_streaming(x)
    np.testing.assert_allclose(sums.cov, np.cov((x - 1e4).numpy(), rowvar=False), rtol=1e-7)


def features_module_streaming(x: Tensor) -> Moments:
    from genkit_eval.references.contents import StreamingMoments

    sums = StreamingMoments()
    for part in x.split(7):
        sums.add(part)
    return sums.moments()


def test_a_file_gives_back_what_was_built_and_is_the_same_every_time(folder: Path, extractor: Extractor, tmp_path: Path) -> None:
    hashes = set()
    for k, batch in enumerate((1, 2, 4)):
        contents = build(open_images(str(folder)), extractor, Work(batch=batch), keep_images=0)
        write_safetensors(tmp_path / f"{k}.safetensors", contents)
        hashes.add(sha256_of(tmp_path / f"{k}.safetensors"))
    assert len(hashes) == 1
    found = load_reference(tmp_path / "0.safetensors", extractor)
    assert (found.num_images, found.sha256, found.resize) == (TOTAL, hashes.pop(), "tf1")
    features = direct(open_images(str(folder)))
    assert torch.equal(found.sample.features, features["features"])
    # 11 images, 20 columns: the spatial layer keeps its features, and a distance from them is exact.
    spatial = found.sample.layer("spatial")
    assert spatial.owns_moments
    assert frechet_distance(spatial.moments, moments_of(features["spatial"]), spatial.features, features["spatial"]) < 1e-9


def test_the_cache_spares_the_network(folder: Path, tmp_path: Path) -> None:
    first, work = Network(), Work(tmp_path / "cache", batch=4)
    contents = build(open_images(str(folder)), extractor_of(first), work)
    assert first.seen == TOTAL
    again = Network()
    cached = build(open_images(str(folder)), extractor_of(again), work)
    assert again.seen == 0
    assert torch.equal(cached.layers["spatial"].moments.cov, contents.layers["spatial"].moments.cov)  # type: ignore[union-attr]
    changes: list[dict[str, Any]] = [{"resize": "clean"}, {"uri": f"folder:{folder}?size=4"}, {"uri": f"folder:{folder}?n=9"}]
    for change in changes:
        other = Network()
        uri = change.pop("uri", str(folder))
        build(open_images(uri), extractor_of(other, **change), work)
        assert other.seen >= 9, change


def test_a_stopped_build_goes_on_and_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    whole = build(open_images(str(folder)), extractor_of(Network()), Work(batch=2))
    work, seen = Work(tmp_path / "cache", batch=2), 0
    for stop in (2, 6, 5):
        network = Network(stop_after=stop)
        with pytest.raises(KeyboardInterrupt):
            build(open_images(str(folder)), extractor_of(network), work)
        seen += network.seen
    block = tmp_path / "cache" / "features"
    next(block.rglob("000000.safetensors")).write_bytes(b"cut short")
    network = Network()
    resumed = build(open_images(str(folder)), extractor_of(network), work)
    assert (seen, network.seen) == (2 + 6 + 5, 4 + 3)  # a batch in hand is lost, and the block that was damaged
    write_safetensors(tmp_path / "a.safetensors", whole)
    write_safetensors(tmp_path / "b.safetensors", resumed)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_unreadable_files_are_left_out_up_to_the_threshold(folder: Path, extractor: Extractor, tmp_path: Path) -> None:
    good = direct(open_images(str(folder)))["features"]
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"IMAGES: 1 file cannot be read: 05.png"):
        build(open_images(str(folder)), extractor)
    work = Work(tmp_path / "cache")
    for _ in range(2):  # the second time mostly from the cache
        contents = build(open_images(str(folder), max_errors=1), extractor, work)
        assert torch.equal(contents.layers["features"].features, good[[k for k in range(TOTAL) if k != 5]])
        assert (contents.about["num_images"], contents.about["unreadable"]) == ("10", "1")
        assert contents.notes[0].startswith("1 file cannot be read: 05.png")


def test_images_that_the_network_does_not_take(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"--size: extractor fake/two-layers takes images of 3x6x6 and these are 3x7x6; --size 6"
    ):
        build(open_images(str(folder)), extractor_of(Network(), image_shape=(3, 6, 6)))
    build(open_images(str(folder), size=6), extractor_of(Network(), image_shape=(3, 6, 6)))


def test_features_that_are_not_finite_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="--extractor: fake/two-layers: features of image 0"):
        build(open_images(str(folder)), extractor_of(lambda pixels: torch.full((len(pixels), WIDTH), torch.nan)))


# --- files of other tools


def golden_extractor(resize: str = "tf1", width: int = 16) -> Extractor:
    def features(pixels: Tensor) -> dict[str, Tensor]:
        flat = pixels.float().flatten(1)
        return {"features": flat[:, :width], "spatial": flat[:, 16:28]}

    return Extractor("fake/inception", "FAKE", "d" * 64, resize, features, layers={"features": width, "spatial": 12})


def by_eigenvalues(first: Any, second: Moments) -> float:
    """The distance as torch-fidelity computes it."""
    roots = np.sqrt(np.linalg.eigvals(first["sigma"] @ second.cov.numpy()).astype(complex)).real.sum()
    gap = np.square(first["mu"] - second.mean.numpy()).sum()
    return float(gap + np.trace(first["sigma"]) + np.trace(second.cov.numpy()) - 2 * roots)


@pytest.mark.parametrize(
    "name",
    [
        "adm_reference.npz",
        "pytorch_fid_stats.npz",
        "cleanfid_custom_kid.npz",
        "dgm_eval_reps.npz",
        "edm2_ref.pkl",
        "myset-inception-v3-compat-stat-fid-2048.pt",
        "myset-inception-v3-compat-features-2048.pt",
    ],
)
def test_every_published_layout_gives_the_golden_distance(name: str, tmp_path: Path) -> None:
    with np.load(FORMATS / "inputs.npz") as inputs:
        b, sb = (moments_of(torch.from_numpy(inputs[key])) for key in ("b", "sb"))
    found = load_reference(FORMATS / name, golden_extractor())
    distance = frechet_distance(found.sample.moments, b)
    if "feat" in name or "kid" in name or "reps" in name:
        assert distance == pytest.approx(EXPECTED["fid(b vs each reference a)"], rel=1e-9)
        assert found.num_images == len(found.sample) == 300
    else:  # means in seven digits
        assert distance == pytest.approx(EXPECTED["fid(b vs each reference a)"], rel=2e-7)
        assert distance == pytest.approx(by_eigenvalues(np.load(FORMATS / "pytorch_fid_stats.npz"), b), rel=1e-9)
    spatial: Sample | None = None
    if name.startswith("adm"):
        spatial = found.sample.layer("spatial")
        assert len(found.sample) == 12, "the images of the file, for precision and recall"
    elif name.startswith("edm2"):
        network = replace(golden_extractor("torch-bicubic-antialias", width=12), name="dinov2-fake")
        spatial = load_reference(FORMATS / name, network).sample
        with pytest.raises(InputError, match="features has 16 columns"):
            load_reference(FORMATS / name, golden_extractor(width=12))
    if spatial is not None:
        assert frechet_distance(spatial.moments, sb) == pytest.approx(EXPECTED["sfid(sb vs sa)"], rel=2e-7)
    assert any("does not record the weights" in note for note in found.notes)


def test_adm_npz_out_and_in_again(folder: Path, extractor: Extractor, tmp_path: Path) -> None:
    contents = build(open_images(str(folder), size=6), extractor, keep_images=7, dataset="noise")
    path = tmp_path / "VIRTUAL_noise.npz"
    write_npz(path, contents)
    with np.load(path, allow_pickle=False) as arrays:  # as ADM's evaluator reads it
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(arrays.files)
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((7, 6, 6, 3), np.uint8)
        assert np.array_equal(arrays["mu_s"], contents.layers["spatial"].moments.mean)  # type: ignore[union-attr]
    again = load_reference(path, extractor)
    assert (again.num_images, again.dataset, again.notes) == (TOTAL, "noise", ())
    assert torch.equal(again.sample.features, contents.layers["features"].features)
    with pytest.raises(InputError, match="was made with extractor fake/two-layers"):
        load_reference(path, replace(extractor, sha256="0" * 64))


# --- pickles


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class SetState:
    """A pickle that names what arrays are made of, with another state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def test_a_pickle_with_code_is_refused_and_nothing_is_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"num_images": 3, "fid": {"mu": Payload(marker), "sigma": np.eye(2)}}))
    with pytest.raises(InputError, match=r"--reference: .*it asks for \w+\.system, which is code and not numbers"):
        load_reference(path, golden_extractor())
    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", path.read_bytes())
    with pytest.raises(ValueError, match=r"it asks for \w+\.system"):
        load_torch(str(evil))
    assert not marker.exists()
    os.system(f"touch {marker}")  # the payload itself is one that would have worked
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_of_every_pickle_protocol(protocol: int) -> None:
    given = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "s": np.float64(0.25),
        "t": (1, [2.5, None, "x"]),
    }
    found = load_numbers(pickle.dumps(given, protocol=protocol))
    assert np.array_equal(found["a"], given["a"])
    assert np.array_equal(found["f"], given["f"])
    assert (found["s"], found["t"]) == (0.25, (1, [2.5, None, "x"]))


_RECONSTRUCT, _NEW = np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([None, 1], dtype=object), "which are not numbers"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "which are not numbers"),
        (np.zeros(2, dtype=[("x", "f4")]), "which are not numbers"),
        (SetState(_RECONSTRUCT, _NEW, (1, (1 << 40,), np.dtype("f8"), False, b"12345678")), "bytes for an array"),
        (SetState(_RECONSTRUCT, _NEW, (1, (1,), np.dtype("f8"), False, [Path])), "it asks for|plain bytes"),
        (Path, "it asks for"),
        ({1, 2}, "it asks for|a set"),
    ],
)
def test_other_things_in_pickles_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_numbers(pickle.dumps(value))
    with pytest.raises(ValueError, match="not a pickle of numbers"):
        load_numbers(pickle.dumps(value)[:-5])


# --- refusals


def contents_of(n: int = 8, **about: str) -> Contents:
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(n))
    known = {"num_images": str(n), "extractor": "fake/inception", "extractor_sha256": "d" * 64, "resize": "tf1"} | about
    return Contents({"features": Layer(moments_of(x), x)}, known)


@pytest.mark.parametrize(
    ("change", "extractor", "message"),
    [
        (
            {"extractor": "dinov2", "extractor_sha256": "e" * 64},
            {},
            r"extractor dinov2 \(eeeeeeeeeeee\), but fake/inception is dddd",
        ),
        ({"resize": "clean"}, {}, r"the resize rule 'clean', and fake/inception here uses 'tf1'"),
        ({}, {"resize": "clean"}, r"the resize rule 'tf1', and fake/inception here uses 'clean'"),
        ({}, {"width": 17}, "features has 16 columns, and fake/inception makes 17"),
    ],
)
def test_references_of_another_protocol_are_refused(
    change: dict[str, str], extractor: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "r.safetensors", contents_of(**change))
    with pytest.raises(InputError, match=f"--reference: .*{message}"):
        load_reference(tmp_path / "r.safetensors", golden_extractor(**extractor))


def test_adm_files_fit_the_tf1_rule_and_no_other(tmp_path: Path) -> None:
    load_reference(FORMATS / "adm_reference.npz", golden_extractor("tf1"))
    with pytest.raises(InputError, match="the resize rule 'adm', and fake/inception here uses 'clean'"):
        load_reference(FORMATS / "adm_reference.npz", golden_extractor("clean"))
    write_safetensors(tmp_path / "r.safetensors", contents_of(resize="adm"))
    load_reference(tmp_path / "r.safetensors", golden_extractor("tf1"))


def test_few_features_nan_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    write_safetensors(path, contents_of(5))
    with pytest.raises(InputError, match="holds 5 features; at least 6 work"):
        load_reference(path, golden_extractor())
    bad = contents_of()
    bad.layers["features"].features[3, 2] = torch.nan  # type: ignore[index]
    write_safetensors(path, bad)
    with pytest.raises(InputError, match="holds NaN or infinite values"):
        load_reference(path, golden_extractor())
    write_safetensors(path, contents_of())
    assert load_reference(path, golden_extractor(), sha256=sha256_of(path)).num_images == 8
    with pytest.raises(InputError, match="it is another file than the one asked for"):
        load_reference(path, golden_extractor(), sha256="0" * 64)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged: its numbers do not have the hash"):
        load_reference(path, golden_extractor())
    path.write_bytes(content[:-30])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_reference(path, golden_extractor())


@pytest.mark.parametrize("name", ["adm_reference.npz", "edm2_ref.pkl", "myset-inception-v3-compat-stat-fid-2048.pt"])
def test_truncated_files_of_other_tools(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((FORMATS / name).read_bytes()[:-600])
    with pytest.raises(InputError, match=r"--reference: .* cannot be read"):
        load_reference(path, golden_extractor())


def test_files_without_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds images and no statistics"):
        load_reference(FORMATS / "adm_samples.npz", golden_extractor())
    with pytest.raises(InputError, match=r"holds a, b, sa, sb; mu and sigma, feats or reps work"):
        load_reference(FORMATS / "inputs.npz", golden_extractor())
    with pytest.raises(InputError, match=r"holds fid, fd_dinov2; got 'clip'"):
        read_pkl(FORMATS / "edm2_ref.pkl", "--reference", "clip")
    (tmp_path / "r.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"is none of \.safetensors, \.npz, \.pkl, \.pt, \.pth"):
        load_reference(tmp_path / "r.csv", golden_extractor())


def test_a_reference_of_moments_alone_serves_what_needs_no_more(tmp_path: Path) -> None:
    from genkit_eval.metrics import METRICS, Pair, unavailable

    found = load_reference(FORMATS / "pytorch_fid_stats.npz", golden_extractor())
    assert (len(found.sample), found.num_images, found.as_dict()["num_images"]) == (0, 0, "not recorded")
    pair = Pair(found.sample, Sample(torch.randn(30, 16)))
    assert unavailable(METRICS["frechet"], pair) is None
    assert "holds only mean and covariance" in (unavailable(METRICS["recall"], pair) or "")


# --- a full disk


class FullDisk(io.FileIO):
    """Takes 1,000 bytes."""

    def write(self, data: Any) -> int:
        room = 1000 - self.tell()
        if len(memoryview(data).cast("B")) > room:
            super().write(memoryview(data).cast("B")[: max(room, 0)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_a_full_disk_leaves_the_earlier_file(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"r{ending}"
    write = write_npz if ending == ".npz" else write_safetensors
    write(path, contents_of())
    before = path.read_bytes()
    usual = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: FullDisk(self, mode) if mode == "wb" else usual(self, mode, *a, **k)
    )
    with pytest.raises(OSError, match="No space left on device"):
        write(path, contents_of(9))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert read_contents(path).num_images == 8


def test_a_full_disk_while_features_are_kept_loses_one_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, usual, written = Work(tmp_path / "cache", batch=4), features_module.write_bytes, list[Path]()

    def full(path: Path, content: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        usual(path, content)

    monkeypatch.setattr(features_module, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        build(open_images(str(folder)), extractor_of(Network()), work)
    monkeypatch.setattr(features_module, "write_bytes", usual)
    network = Network()
    build(open_images(str(folder)), extractor_of(network), work)
    assert network.seen == TOTAL - 4


def test_features_that_would_fill_the_disk_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    build(open_images(str(folder)), extractor_of(Network()), Work(tmp_path / "cache"))
    assert "no room in" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
