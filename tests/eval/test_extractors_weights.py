"""Weights: fetched once, checked always, never silently another file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from genkit_eval.errors import InputError
from genkit_eval.extractors import weights
from genkit_eval.extractors.clip import WEIGHTS as CLIP
from genkit_eval.extractors.dinov2 import MODELS
from genkit_eval.extractors.inception import WEIGHTS as INCEPTION
from genkit_eval.extractors.weights import HubFile, WeightsFile, locate

CONTENT = b"weights"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def published(tmp_path: Path) -> WeightsFile:
    source = tmp_path / "server" / "net.pth"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    return WeightsFile("net.pth", source.as_uri(), SHA, ("net.pth", "pt_net.pth"))


def test_fetched_once(published: WeightsFile, cache: Path) -> None:
    assert locate(published) == (cache / "net.pth", SHA)
    offline = replace(published, url="file:///absent")
    assert locate(offline) == (cache / "net.pth", SHA)
    assert [path.name for path in cache.iterdir()] == ["net.pth"]


def test_offline_says_what_to_do(published: WeightsFile, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        locate(replace(published, url="http://127.0.0.1:9/net.pth"))
    text = str(caught.value)
    for part in ("--weights: cannot fetch http://127.0.0.1:9/net.pth", str(cache / "net.pth"), "--weights PATH"):
        assert part in text
    assert not list(cache.iterdir())


def test_a_server_with_another_file(published: WeightsFile, cache: Path) -> None:
    other = replace(published, sha256="0" * 64)
    with pytest.raises(InputError, match=f"net.pth gave a file with sha256 {SHA}, not {'0' * 64}; it was not kept"):
        locate(other)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(published: WeightsFile, cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(InputError, match=r"--weights: cannot fetch .*net\.pth"):
        locate(published)


def test_a_damaged_cache(published: WeightsFile, cache: Path) -> None:
    locate(published)
    (cache / "net.pth").write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"has sha256 .*, but net.pth as published has {SHA}; delete it"):
        locate(published, any_weights=True)


def test_a_given_file(published: WeightsFile, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(
        InputError, match=f"--weights: .*mine.pth has sha256 {found}, but net.pth as published has {SHA}; .*--any-weights"
    ):
        locate(published, path)
    assert locate(published, path, any_weights=True) == (path, found)
    with pytest.raises(InputError, match=r"--weights: .*absent.pth cannot be read"):
        locate(published, tmp_path / "absent.pth")


def test_what_other_tools_fetched_is_used_if_it_is_the_file(published: WeightsFile, tmp_path: Path, cache: Path) -> None:
    copies = tmp_path / "hub" / "checkpoints"
    copies.mkdir(parents=True)
    (copies / "net.pth").write_bytes(b"something else")
    (copies / "pt_net.pth").write_bytes(CONTENT)
    assert locate(replace(published, url="file:///absent")) == (copies / "pt_net.pth", SHA)


def test_hub_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HubFile.at("a/b", "c" * 40, "model.safetensors", SHA)
    assert file.url == f"https://huggingface.co/a/b/resolve/{'c' * 40}/model.safetensors"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(CONTENT)
    asked = []
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *a, **k: asked.append((a, k)) or str(copy))
    assert locate(file) == (copy, SHA)
    assert asked == [(("a/b", "model.safetensors"), {"revision": "c" * 40})]


def test_every_published_file_is_pinned() -> None:
    files = [INCEPTION, CLIP, *(file for _, file in MODELS.values())]
    assert len({file.name for file in files}) == len({file.sha256 for file in files}) == 6
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.url.startswith("https://")
    assert INCEPTION.sha256.startswith("6726825d")
    assert all(file.revision in file.url for file in files if isinstance(file, HubFile))


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENKIT_CACHE")
    assert weights.cache_folder() == Path.home() / ".cache" / "genkit"
