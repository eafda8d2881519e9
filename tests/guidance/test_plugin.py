"""A guidance in a package of its own, installed with pip and found through its entry point by the command line and the laws."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *command: str) -> str:
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "eval")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed; built from a copy, because building leaves files beside the source."""
    base = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "tests" / "plugin", base / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(base, "-m", "pip", "install", *options, "--target", str(base / "site"), str(base / "source"))
    return base / "site"


def test_it_is_not_there_without_the_package() -> None:
    assert "Halfway" not in run(ROOT, "-m", "genkit_eval", "guidances")


def test_the_command_line_lists_it(installed: Path) -> None:
    listed = run(installed, "-m", "genkit_eval", "guidances")
    assert "Halfway(scale, half_life=3.0)" in listed
    assert "Interval(inner, low, high, unit='sigma')" in listed


def test_it_passes_the_laws(installed: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-n", "0", "-k", "Halfway")
    out = run(installed, "-m", "pytest", *options, "tests/guidance/test_laws.py")
    found = re.search(r"(\d+) passed", out)
    assert found is not None
    assert int(found[1]) > 40
