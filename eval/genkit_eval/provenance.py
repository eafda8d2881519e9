"""Where a number comes from: versions, commit, machine, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DISTRIBUTIONS = {"torch": "torch", "numpy": "numpy", "genkit": "genkit-image", "torchmetrics": "torchmetrics"}


def genkit_version() -> str:
    """The installed version, or that of the source tree."""
    try:
        return version("genkit-image")
    except PackageNotFoundError:
        import genkit

        return str(getattr(genkit, "__version__", "unknown"))


def versions() -> dict[str, str]:
    """Versions of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = genkit_version() if name == "genkit" else "not installed"
    return found


def git_commit() -> dict[str, Any] | None:
    """Commit of the repository genkit's source lies in, and whether tracked files differ from it; None outside one."""
    import genkit

    source = Path(genkit.__file__)

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(source.parent), *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # A virtual environment may lie inside someone else's repository: only one that tracks this file counts.
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def made_with(device: str) -> dict[str, Any]:
    """What is written into each block: commit, whether tracked files differ from it, device; None where it is not known."""
    found = git_commit() or {"commit": None, "dirty": None}
    gpu = hardware(device).get("gpu")
    return {**found, "device": f"{device} ({gpu})" if gpu else device}


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, threads of torch, and the accelerator in use."""
    import torch

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def attention(pipe: Any) -> dict[str, Any]:
    """The backend of attention that is asked for, by whom, and what the pipeline's networks ask for themselves."""
    from genkit.attention import chosen
    from genkit.pipelines.networks import networks

    try:
        return chosen(*networks(pipe))
    except ValueError:  # someone else's pipeline, with no network to be seen
        return chosen()


def command(extra_remove: tuple[str, ...] = ()) -> str:
    """The command line as typed, ready to paste; ``extra_remove`` options are left out."""
    name = Path(sys.argv[0]).name
    program = "genkit-eval" if name.startswith("genkit-eval") else "python -m genkit_eval"
    return " ".join([program, *(shlex.quote(arg) for arg in sys.argv[1:] if arg not in extra_remove)])


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
