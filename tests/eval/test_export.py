"""Images of a run as files: what other tools read is what was made."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from genkit_eval.cli import invoke
from genkit_eval.extractors import Extractor
from genkit_eval.images import open_images
from genkit_eval.references import Reference
from genkit_eval.run import make_config, run
from PIL import Image

from genkit.guidance import CFG
from tests.eval.standins import FakePipeline, Runner

N = 26


@pytest.fixture(scope="module")
def made(extractor: Extractor, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps all its pixels, and one that keeps those of 13 images."""
    folder = tmp_path_factory.mktemp("export")
    for name, keep in (("all", N), ("some", 13)):
        pipe = FakePipeline()
        config = make_config(pipe, extractor, "heun", 3, 0, "balanced", 10, keep_images=keep)
        run(pipe, extractor, reference, config, Runner(extractor, reference, folder / name).request("none", "CFG(2.0)", n=N))
    return folder


def expected(n: int) -> tuple[np.ndarray, list[int]]:
    pipe = FakePipeline()
    labels = [k % pipe.num_classes for k in range(n)]
    out = pipe(classes=labels, seeds=list(range(n)), guidance=CFG(2.0), sampler="heun", steps=3, trace="none")
    return out.pixels.permute(0, 2, 3, 1).numpy(), labels


@pytest.mark.parametrize("to", ["x.npz", "x.zip", "x"])
@pytest.mark.parametrize(("name", "count"), [("all", N), ("some", 13)])
def test_what_is_written_is_what_was_made(
    to: str, name: str, count: int, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["export", f"{made / name}:CFG(2.0)", "--to", str(tmp_path / to)]) == 0
    said = capsys.readouterr().out
    assert f"{count} of {N} images" in said
    assert ("--keep-images 26" in said) == (count < N)
    pixels, labels = expected(count)
    if to == "x.npz":
        with np.load(tmp_path / to) as found:
            assert np.array_equal(found["arr_0"], pixels)
            assert found["arr_1"].tolist() == labels
    source = open_images(str(tmp_path / to)).source
    assert len(source.names) == count
    # PNGs come back by class; each image is one of those made, of its class.
    images = {(label, image.tobytes()) for label, image in zip(labels, pixels, strict=True)}
    assert source.labels is not None
    found = [source.read(i) for i in range(count)]
    decoded = [np.asarray(Image.open(io.BytesIO(x))) if isinstance(x, bytes) else x for x in found]
    assert {(label, image.tobytes()) for label, image in zip(source.labels, decoded, strict=True)} == images


def test_what_cannot_be_exported(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "folder.npz").mkdir()
    for source, to, message in (
        (f"{made / 'all'}", "x.npz", "has several guidances; name one"),
        (f"{made / 'all'}:CFG(9.0)", "x.npz", "has no guidance"),
        (f"{made / 'all'}:none", "full", "a new folder works"),
        (f"{made / 'all'}:none", "x.tiff", "an .npz (ADM's)"),
        (f"{made / 'all'}:none", "folder.npz", "the name of a file works"),
    ):
        assert invoke(["export", source, "--to", str(tmp_path / to)]) == 2
        assert message in capsys.readouterr().err
    for blocks in (made / "all").glob("*/blocks/*.safetensors"):
        blocks.unlink()
    assert invoke(["export", f"{made / 'all'}:none", "--to", str(tmp_path / "x.npz")]) == 2
    assert "--keep-images N" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()
