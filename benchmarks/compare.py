"""Comparisons of many guidances with the built-in model: runs genkit-eval in several processes and keeps the numbers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLER, STEPS = "dpmpp_2m", 8
LOW, HIGH = 0.28, 5.42  # the interval of Kynkaanniemi et al. 2024 for latents of ImageNet-512


def options(about: str | None, name: str, samples: int, more: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line that the comparisons share, with options of one's own in ``more``."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0], parents=[more] if more else [])
    parser.add_argument("--num-samples", type=int, default=samples)
    parser.add_argument("--parts", type=int, default=1, help="processes of one thread that make the images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--keep", type=Path, default=ROOT / "docs" / "runs" / f"{name}.json")
    return parser.parse_args()


def command(guidances: tuple[str, ...], samples: int, out: Path, sampler: str | None, steps: int | None, model: str) -> list[str]:
    wanted = [part for text in guidances for part in ("--guidance", text)]
    chosen = [*(["--sampler", sampler] if sampler else []), *(["--steps", str(steps)] if steps else [])]
    sizes = ["--num-samples", str(samples), "--block-size", "100", *chosen]
    return [sys.executable, "-m", "genkit_eval", "run", "--model", model, "--out", str(out), *sizes, *wanted]


def generate(
    guidances: tuple[str, ...],
    samples: int,
    out: Path,
    parts: int,
    sampler: str | None = SAMPLER,
    steps: int | None = STEPS,
    model: str = "builtin/cifar10",
) -> dict[str, Any]:
    """Results of all guidances, left in ``out`` too; the images are made in ``parts`` processes, finished blocks are kept.

    ``sampler`` and ``steps`` are None for models that have their own.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = {entry["label"] for entry in read(out)["guidances"]} if (out / "results.json").exists() else set()
    missing = tuple(text for text in guidances if text not in done)
    shares = [missing[part::parts] for part in range(parts)] if parts > 1 else []
    jobs = [command(share, samples, out / f"part{number}", sampler, steps, model) for number, share in enumerate(shares) if share]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    processes = [subprocess.Popen(job, env=environment) for job in jobs]
    codes = [process.wait() for process in processes]  # every one, before giving up
    if any(codes):
        raise SystemExit("a part failed; see above. Run the same command again to go on.")
    for folder in sorted(out.glob("part*/*/blocks")):
        target = out / folder.parent.name
        if not target.exists():
            folder.parent.rename(target)
    subprocess.run(command(guidances, samples, out, sampler, steps, model), check=True)
    return read(out)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def keep(path: Path, results: dict[str, Any], script: str, samples: int) -> None:
    """Write the run file: the results without traces, with the command that makes them."""
    for entry in results["guidances"]:
        entry.pop("trace", None)
    results["command"] = f"python benchmarks/{script} --num-samples {samples}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
