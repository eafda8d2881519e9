"""Image sources: order, labels, decoding, crops, damaged files."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from genkit_eval.errors import InputError
from genkit_eval.images import Images, View, open_images
from genkit_eval.images.uri import expand
from genkit_eval.images.view import decode
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "eval" / "images"
RNG = np.random.default_rng(0)
NAMES = ["cat/a.png", "cat/b.JPEG", "dog/Z.png", "dog/a.png", "dog/é.png", "eel/0.png"]


def encoded(seed: int, name: str, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if name.endswith("png") else "JPEG")
    return buffer.getvalue()


CONTENT = {name: encoded(k, name) for k, name in enumerate(NAMES)}


def pixels_of(images: Images, **more: Any) -> list[torch.Tensor]:
    return [pixels for batch in images.batches(4, **more) for pixels in batch.pixels]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name, content in reversed(CONTENT.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "README.txt").write_text("not an image")
    (root / "cat" / "._a.png").write_bytes(b"what a Macintosh leaves behind")
    return root


def pack_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return path


def pack_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in reversed(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_bytes(files: dict[str, bytes], folder: Path) -> bytes:
    return pack_tar(folder / "inner.tar", files).read_bytes()


def test_folder_zip_tar_and_tar_of_tars_are_one_dataset(folder: Path, tmp_path: Path) -> None:
    by_class = {c: {n.split("/")[1]: x for n, x in CONTENT.items() if n.startswith(c)} for c in ("cat", "dog", "eel")}
    places = [
        folder,
        pack_zip(tmp_path / "set.zip", CONTENT),
        pack_tar(tmp_path / "set.tar", CONTENT),
        pack_tar(tmp_path / "nested.tar", {f"{c}.tar": tar_bytes(files, tmp_path) for c, files in by_class.items()}),
    ]
    expected = [decode(CONTENT[name], View())[0] for name in NAMES]
    for place in places:
        images = open_images(str(place))
        assert images.source.names == NAMES  # "Z" before "a", "é" last: bytes, not letters
        assert images.labels(range(6)) == [0, 0, 1, 1, 1, 2]
        assert images.source.class_names == ("cat", "dog", "eel")
        assert all(torch.equal(a, b) for a, b in zip(pixels_of(images), expected, strict=True))
    assert len({open_images(str(place)).fingerprint for place in places}) == 1
    assert open_images(str(folder)).source.skipped == ("README.txt", "cat/._a.png")


def test_fingerprint_changes_with_a_byte_a_name_and_the_choice(folder: Path) -> None:
    first = open_images(str(folder)).fingerprint
    assert open_images(f"folder:{folder}?n=5").fingerprint != first
    (folder / "eel" / "0.png").rename(folder / "eel" / "1.png")
    renamed = open_images(str(folder)).fingerprint
    content = bytearray((folder / "eel" / "1.png").read_bytes())
    content[-20] ^= 1
    (folder / "eel" / "1.png").write_bytes(content)
    assert len({first, renamed, open_images(str(folder)).fingerprint}) == 3


def test_flat_folders_have_no_labels_and_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for k in (2, 10, 1):
        (tmp_path / "real" / f"{k}.png").write_bytes(encoded(k, "a.png"))
    flat = tmp_path / "flat"
    flat.mkdir()
    os.symlink(tmp_path / "real", flat / "link")
    os.symlink(flat, tmp_path / "real" / "loop")
    images = open_images(str(flat))
    assert images.source.names == ["link/1.png", "link/10.png", "link/2.png"]
    assert images.labels([0]) is None


def test_edm_zip_takes_labels_from_its_json(tmp_path: Path) -> None:
    files = {f"00000/img{k:08d}.png": encoded(k, "a.png") for k in range(3)}
    labels = [[name, 7 - k] for k, name in enumerate(files)]
    path = pack_zip(tmp_path / "dataset.zip", files | {"dataset.json": json.dumps({"labels": labels}).encode()})
    images = open_images(str(path))
    assert images.labels(range(3)) == [7, 6, 5]
    assert images.source.skipped == ()
    short = pack_zip(tmp_path / "short.zip", files | {"dataset.json": json.dumps({"labels": labels[:1]}).encode()})
    with pytest.raises(InputError, match=r"no label for 00000/img00000001.png and 1 more"):
        open_images(str(short))
    none = pack_zip(tmp_path / "none.zip", files | {"dataset.json": b'{"labels": null}'})
    assert open_images(str(none)).labels([0]) is None


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        files = {f"{k:03d}.png": encoded(10 * shard + k, "a.png") for k in range(3)}
        pack_tar(tmp_path / f"x-{shard:04d}.tar", files | {f"{k:03d}.cls": str(shard + k).encode() for k in range(3)})
    images = open_images(f"wds:{tmp_path}/x-{{0000..0001}}.tar")
    assert images.source.names[:4] == ["x-0000/000.png", "x-0000/001.png", "x-0000/002.png", "x-0001/000.png"]
    assert images.labels(range(6)) == [0, 1, 2, 1, 2, 3]
    assert torch.equal(pixels_of(images)[4], decode(encoded(11, "a.png"), View())[0])
    assert expand("a{1..2}{x,y}") == ["a1x", "a1y", "a2x", "a2y"]
    assert [Path(p).name for p in expand(f"{tmp_path}/x-*.tar")] == ["x-0000.tar", "x-0001.tar"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_samples(save: Any, tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    save(tmp_path / "s.npz", pixels, np.arange(5) * 2)
    images = open_images(str(tmp_path / "s.npz"))
    assert images.labels(range(5)) == [0, 2, 4, 6, 8]
    assert torch.equal(torch.stack(pixels_of(images)).permute(0, 2, 3, 1), torch.from_numpy(pixels))
    np.save(tmp_path / "s.npy", pixels)
    assert torch.equal(pixels_of(open_images(str(tmp_path / "s.npy")))[3], pixels_of(images)[3])
    save(tmp_path / "f.npz", pixels / 255.0)
    with pytest.raises(InputError, match=r"holds float64 \(5, 8, 6, 3\); uint8 \(N, H, W, 3\)"):
        open_images(str(tmp_path / "f.npz"))


def test_formats_of_published_samples() -> None:
    formats = GOLDEN.parent / "formats"
    with_labels, without = open_images(str(formats / "adm_samples.npz")), open_images(str(formats / "dit_var_samples.npz"))
    assert len(with_labels) == len(without) == 12
    assert with_labels.labels([0]) is not None
    assert without.labels([0]) is None
    assert pixels_of(without)[0].shape == (3, 32, 32)


@pytest.mark.parametrize("name", sorted(np.load(GOLDEN / "decoded.npz").files))
def test_awkward_files_decode_as_the_peers_do(name: str) -> None:
    pixels, kinds = decode((GOLDEN / name).read_bytes(), View())
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.load(GOLDEN / "decoded.npz")[name])
    assert kinds == {"cmyk.jpg": ["CMYK"], "gray16.png": ["16-bit grey"], "rgba.png": ["alpha"]}.get(name, [])


def test_exif_rotation_is_not_applied_and_noted() -> None:
    pixels, kinds = decode((GOLDEN / "exif_rot90.jpg").read_bytes(), View())
    assert pixels.shape == (3, 97, 160)
    assert int(pixels.sum(dtype=torch.int64)) == pytest.approx(5913702, rel=1e-5)  # of the golden files
    assert kinds == ["EXIF rotation"]


def test_notes_are_counted(tmp_path: Path) -> None:
    for k in range(3):
        shutil.copy(GOLDEN / "gray16.png", tmp_path / f"{k}.png")
    (batch,) = open_images(str(tmp_path)).batches(8)
    (line,) = batch.problems.lines()
    assert line.startswith("3 images with 16-bit grey (first 0.png): values above 255 become white")


def adm_crop(pixels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The rule, step by step on arrays."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[:2]
        pixels = np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX))
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = np.asarray(Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(97, 61), (64, 200), (33, 32), (16, 20), (11, 7)])
def test_adm_crop(shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    found, _ = decode(pixels, View(16, "adm"))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), adm_crop(pixels, 16))


def test_center_and_plain_views() -> None:
    pixels = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(decode(pixels, View())[0], whole)
    assert torch.equal(decode(pixels, View(None, "center"))[0], whole[:, :, 6:26])  # 5.5 rounds to 6, as in torchvision
    assert torch.equal(decode(pixels, View(20, "center"))[0], whole[:, :, 6:26])
    assert decode(pixels, View(10, "center"))[0].shape == (3, 10, 10)
    assert decode(pixels, View(10, "none"))[0].shape == (3, 10, 10)


def test_damaged_files_are_counted_named_and_refused_above_a_threshold(folder: Path) -> None:
    whole = (folder / "dog" / "a.png").read_bytes()
    (folder / "dog" / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "b.JPEG").write_bytes(b"<html>404</html>")
    images = open_images(str(folder), max_errors=2)
    batches = list(images.batches(4))
    assert [batch.positions for batch in batches] == [[0, 2], [4, 5]]
    problems = batches[0].problems
    problems.add(batches[1].problems)
    assert [name for name, _ in problems.errors] == ["cat/b.JPEG", "dog/a.png"]
    problems.check(2, "IMAGES")
    with pytest.raises(
        InputError, match=r"^IMAGES: 2 files cannot be read: cat/b.JPEG \(.*; dog/a.png \(.*--max-errors 2 or more"
    ):
        problems.check(1, "IMAGES")


def test_damaged_containers_are_refused(tmp_path: Path) -> None:
    path = pack_zip(tmp_path / "a.zip", CONTENT)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot be read as a zip"):
        open_images(str(path))
    path = pack_tar(tmp_path / "a.tar", CONTENT)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read as a tar"):
        open_images(str(path))
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="cannot be read as images"):
        open_images(str(tmp_path / "a.npz"))


def test_a_member_with_a_wrong_crc_is_an_unreadable_file(tmp_path: Path) -> None:
    path = pack_zip(tmp_path / "a.zip", CONTENT)
    content = bytearray(path.read_bytes())
    content[content.index(CONTENT["dog/a.png"]) + 30] ^= 1
    path.write_bytes(content)
    problems = next(open_images(str(path)).batches(8)).problems
    assert [name for name, _ in problems.errors] == ["dog/a.png"]
    assert "CRC" in problems.errors[0][1]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        open_images(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no images; 1 other files, such as notes.txt"):
        open_images(str(tmp_path))
    for uri, message in (
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path / "notes.txt"), r"is not a folder, \.zip"),
        (f"tar:{tmp_path}/x-{{0..1}}.tar", "there is no .*x-0.tar"),
    ):
        with pytest.raises(InputError, match=message):
            open_images(uri)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("sise=8", "unknown key 'sise'"),
        ("size=big", "size: got 'big'"),
        ("crop=left", "--crop: got 'left'; one of adm, center, none works"),
        ("crop=adm", "adm needs a size"),
        ("n=7", "got 7 images to use of 6"),
        ("order=random", "order: got 'random'"),
    ],
)
def test_keys_that_do_not_work(query: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_images(f"folder:{folder}?{query}")


def test_keys_choose_and_size(folder: Path) -> None:
    images = open_images(f"folder:{folder}?size=4&n=3&order=shuffle:1")
    assert (images.view, len(images)) == (View(4, "adm"), 3)
    assert list(images.chosen) == torch.randperm(6, generator=torch.Generator().manual_seed(1))[:3].tolist()
    assert {pixels.shape for pixels in pixels_of(images)} == {(3, 4, 4)}
    assert open_images(str(folder), size=4, crop="center", num_images=2).view == View(4, "center")


def test_imagenet_layout_is_found(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "ilsvrc" / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    assert open_images(f"imagenet:{tmp_path / 'ilsvrc'}?split=val").source.names == NAMES


def test_order_does_not_depend_on_threads_and_decoding_runs_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(folder))
    expected = pixels_of(images, workers=1)
    read, seen = images.source.read, list[str]()

    def slow(index: int) -> Any:
        seen.append(threading.current_thread().name)
        time.sleep(0.02 * (6 - index))
        return read(index)

    monkeypatch.setattr(images.source, "read", slow)
    batches = images.batches(1, workers=3)
    first = next(batches)
    until = time.monotonic() + 30
    while len(seen) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(seen) == 6, "all are read while nobody asks for the second"
    rest = [batch.pixels[0] for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip([first.pixels[0], *rest], expected, strict=True))
    assert len(set(seen)) == 3


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Rows(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {"img": None, "label": SimpleNamespace(names=["cat", "dog"])}
        _fingerprint = "f" * 16

        def cast_column(self, column: str, kind: Any) -> Rows:
            assert (column, kind) == ("img", "encoded")
            return self

        def __getitem__(self, key: Any) -> Any:
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def load(name: str, config: str | None, **more: Any) -> Rows:
        asked.append((name, config, more))
        return Rows({"img": {"bytes": encoded(k, "a.png"), "path": None}, "label": k % 2} for k in range(4))

    stub = SimpleNamespace(load_dataset=load, Image=lambda decode: "encoded" if not decode else "")
    monkeypatch.setitem(sys.modules, "datasets", stub)
    images = open_images("hf:someone/pets?split=test&revision=abc&n=3")
    assert asked == [("someone/pets", None, {"split": "test", "revision": "abc"})]
    assert images.labels(range(3)) == [0, 1, 0]
    assert images.source.class_names == ("cat", "dog")
    assert torch.equal(pixels_of(images)[2], decode(encoded(2, "a.png"), View())[0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_images("hf:someone/pets")
