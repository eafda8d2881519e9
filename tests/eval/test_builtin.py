"""The command with the built-in model: a killed run goes on, and ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def start(out):
    size = ["--num-samples", "24", "--block-size", "4", "--sampler", "euler", "--steps", "3", "--bootstrap", "0"]
    command = [sys.executable, "-m", "genkit_eval", "run", "--guidance", "CFG(2.0)", "--out", str(out), *size]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'eval'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def blocks(out):
    return {path.name: load_file(path) for path in sorted(out.glob("*/blocks/*.safetensors"))}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read().decode()
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("*/blocks/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/blocks/*.safetensors")}
    assert left
    if len(left) == 6:
        pytest.skip("the machine was too fast: nothing was left to do when the run was killed")
    again = start(tmp_path / "killed")
    assert again.wait(timeout=300) == 0, again.stderr.read().decode()
    assert all(path.stat().st_mtime_ns == at for path, at in left.items())  # finished blocks were not made again
    one, other = blocks(tmp_path / "whole"), blocks(tmp_path / "killed")
    assert list(one) == list(other)
    assert len(one) == 6
    for name, block in one.items():
        for key in ("features", "pixels", "labels", "nfe"):
            assert block[key].equal(other[name][key]), f"{name}: {key}"
    values = [
        {
            key: m["value"]
            for key, m in json.loads((tmp_path / run / "results.json").read_text())["guidances"][0]["metrics"].items()
        }
        for run in ("whole", "killed")
    ]
    assert values[0] == values[1]
