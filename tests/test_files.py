"""Files that are whole or absent, and JSON files that say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genkit.files import read_json, write_atomically, write_json


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.txt"
    write_atomically(file, lambda at: at.write_text("old"))

    def fail(at: Path) -> None:
        assert at.parent == file.parent
        at.write_text("half")
        assert file.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [("a.txt", "old")]


def test_two_files_of_one_stem_have_temporary_files_of_their_own(tmp_path: Path) -> None:
    def both(at: Path) -> None:
        at.write_text("weights")
        write_json(tmp_path / "a.json", {})
        assert at.read_text() == "weights"

    write_atomically(tmp_path / "a.safetensors", both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"format": "f-1", "list": [1, "ä", None], "number": 0.1}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", "f-1", "Thing.save", list=list, number=float) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"path='.*a\.json' cannot be read as JSON .*give a file written by Thing\.save"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"[]", r"path='.*a\.json' is not a file of format 'f-1'; give a file written by Thing\.save"),
        (json.dumps({"format": "f-2", "list": []}).encode(), "is not a file of format 'f-1'"),
        (json.dumps({"format": "f-1"}).encode(), "is not a file of format 'f-1'"),
        (json.dumps({"format": "f-1", "list": {}}).encode(), "is not a file of format 'f-1'"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json", "f-1", "Thing.save", list=list)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json", "f-1", "Thing.save")
