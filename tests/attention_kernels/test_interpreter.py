"""The Triton programs: checked by Triton's interpreter and compiler, needed by nothing, and harmless where they fail."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from genkit.attention.kernels import launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs genkit-image[triton]")
@pytest.mark.parametrize(("checks", "interpret"), [("interpreted.py", "1"), ("compiled.py", "0")])
def test_the_programs(checks: str, interpret: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / checks)]
    env = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_nothing_loads_triton() -> None:
    code = (
        "import sys, torch; from genkit.attention.kernels import modulate; "
        "modulate(torch.ones(1, 2, 4), torch.ones(4), torch.ones(4)); print('triton' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no interpreter, nothing tried yet."""
    monkeypatch.setattr(launch, "_broken", set())
    monkeypatch.setattr(launch, "_compared", set())
    monkeypatch.setattr(launch, "INTERPRETED", False)


@pytest.mark.usefixtures("outside")
def test_a_program_that_fails_is_reported_once_and_left_out() -> None:
    x, plain = torch.ones(1), lambda: "plain"
    with pytest.warns(RuntimeWarning, match="'no_such_program' is off, plain torch takes its place: ModuleNotFoundError"):
        assert launch.fused("no_such_program", plain, x) == "plain"
    assert launch.fused("no_such_program", plain, x) == "plain"  # a second warning would be an error here


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-6, 1.01])
def test_a_program_that_errs_on_this_device_is_left_out(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        ran.append(k)
        return x * factor, torch.tensor([k]), None

    monkeypatch.setitem(sys.modules, "genkit.attention.kernels.triton_x", types.SimpleNamespace(run=run))
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def call(dtype: torch.dtype = torch.float32, k: int = 3) -> torch.Tensor:
        y = x.to(dtype)
        return launch.fused("x", lambda: (y, torch.tensor([3]), None), y, k)[0]

    right = factor < 1.001
    with nullcontext() if right else pytest.warns(RuntimeWarning, match="its results are not those of plain torch"):
        assert torch.equal(call(), x * factor if right else x)
    call()
    assert len(ran) == (2 if right else 1)
    if right:
        # Compared once for each dtype, and drawn numbers too.
        with pytest.warns(RuntimeWarning, match="'x' is off"):
            assert torch.equal(call(torch.bfloat16, k=4), x.bfloat16())


@pytest.mark.parametrize("variable", ["0", "1"])
def test_the_environment_turns_the_programs_off(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setenv("GENKIT_KERNELS", variable)
    assert launch.usable(torch.ones(1), None) == (variable == "1")
    assert not launch.usable(torch.ones(1), torch.ones(1, requires_grad=True))
    assert not launch.usable(torch.ones(1, dtype=torch.float64))
    assert not launch.usable(torch.ones(0))
