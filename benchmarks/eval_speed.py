"""Time and memory of the metrics beside what others do, on features like those of Inception: 2048 columns, rectified.

    python benchmarks/eval_speed.py [--threads 2] [--large] [--out docs/runs/eval_speed.json]

Frechet distance from two sets of statistics: Cholesky and eigenvalues against scipy's matrix square root (pytorch-fid,
clean-fid, EDM2). Neighbours: precision, recall, density and coverage from float32 tiles against precision and recall from three
whole matrices of torch.cdist (torch-fidelity); ``--large`` also at 50,000 images, where those matrices are 28 GiB. Every
measurement is a process of its own; kinds alternate, and the best of the repeats counts. Seconds of CPU are the steadier number
on a machine that does other things. Fails where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from genkit_eval.metrics import METRICS, Pair, Sample
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.moments import Moments, moments_of
from record import save
from torch import Tensor

WIDTH, K = 2048, 3
FOUR = ("precision", "recall", "density", "coverage")


def features(n: int, seed: int) -> Tensor:
    """Rectified (N, 2048) float32 with correlated columns and a mean squared length of 100."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    scale = torch.linspace(2, 0.05, WIDTH)
    x = torch.empty(n, WIDTH)
    for part in x.split(1024):  # no more memory than the result
        part.copy_((torch.randn(len(part), WIDTH, generator=g) * scale) @ turn + 0.02 * seed).relu_()
    return x.mul_((100 / (x.square().sum(dim=1).mean())) ** 0.5)


def statistics(n: int) -> tuple[Moments, Moments]:
    return moments_of(features(n, 1)), moments_of(features(n, 2))


def own_frechet(n: int) -> Callable[[], Any]:
    first, second = statistics(n)
    return lambda: frechet_distance(first, second)


def scipy_frechet(n: int) -> Callable[[], Any]:
    from scipy import linalg

    first, second = statistics(n)
    (m1, s1), (m2, s2) = ((m.mean.numpy(), m.cov.numpy()) for m in (first, second))

    def run() -> float:
        root = linalg.sqrtm(s1 @ s2).real.trace()
        return float(((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * root)

    return run


def own_neighbours(n: int) -> Callable[[], Any]:
    real, fake = features(n, 1), features(n, 2)

    def run() -> dict[str, float]:
        pair = Pair(Sample(real), Sample(fake))
        return {name: METRICS[name].value(pair) for name in FOUR}

    return run


def cdist_neighbours(n: int) -> Callable[[], Any]:
    """Precision and recall alone, as torch-fidelity takes them: whole matrices, the k-th value of each line."""
    real, fake = features(n, 1), features(n, 2)

    def run() -> dict[str, float]:
        real_radii, fake_radii = (torch.cdist(x, x).kthvalue(K + 1).values for x in (real, fake))
        distances = torch.cdist(fake, real)
        precision = (distances <= real_radii).any(dim=1).double().mean()
        recall = (fake_radii >= distances.T).any(dim=1).double().mean()
        return {"precision": float(precision), "recall": float(recall)}

    return run


KINDS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "frechet, genkit": own_frechet,
    "frechet, scipy sqrtm": scipy_frechet,
    "neighbours, genkit (4 metrics)": own_neighbours,
    "neighbours, cdist (2 metrics)": cdist_neighbours,
}


def peak() -> float:
    """Largest resident memory since it was last forgotten, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def one(kind: str, n: int) -> dict[str, Any]:
    """Measure in this process: inputs are made before, and memory is what is taken above them."""
    run = KINDS[kind](n)
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    value = run()
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "extra_mib": peak() - before}
    return {"value": value, **took}


def measure(kinds: list[str], n: int, repeats: int, threads: int) -> dict[str, dict[str, Any]]:
    """Best of each kind, in alternation."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            command = [sys.executable, __file__, "--one", kind, "--images", str(n), "--threads", str(threads)]
            # Threads that wait do not count as seconds of CPU.
            passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=passive).stdout
            found[kind].append(json.loads(out.splitlines()[-1]))
    best = {}
    for kind, runs in found.items():
        best[kind] = {"value": runs[0]["value"], **{key: min(r[key] for r in runs) for key in ("wall_s", "cpu_s")}}
        best[kind]["extra_mib"] = max(r["extra_mib"] for r in runs)
        row = best[kind]
        print(
            f"{n:6d}  {kind:32s} {row['wall_s']:8.2f} s  {row['cpu_s']:8.2f} CPU s  {row['extra_mib']:7.0f} MiB  {row['value']}"
        )
    return best


def missed(frechet: dict[str, Any], near: dict[str, Any], large: dict[str, Any]) -> list[str]:
    """Targets that do not hold."""
    own, peer = frechet["frechet, genkit"], frechet.get("frechet, scipy sqrtm")
    four, two = near["neighbours, genkit (4 metrics)"], near["neighbours, cdist (2 metrics)"]
    checks = {
        "neighbours at 10,000 in 0.3 GiB": four["extra_mib"] <= 0.3 * 1024,
        "four metrics no slower than cdist's two": four["cpu_s"] <= two["cpu_s"],
    }
    if peer is not None:
        checks["Frechet distance 5 times as fast as sqrtm"] = peer["cpu_s"] >= 5 * own["cpu_s"]
        checks["Frechet distance equal to 1e-9"] = abs(own["value"] - peer["value"]) <= 1e-9 * peer["value"]
    for row in large.values():
        checks["neighbours at 50,000 in 1 GiB"] = row["extra_mib"] <= 1024
    return [name for name, held in checks.items() if not held]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="also 50,000 images (minutes)")
    parser.add_argument("--out", default="")
    parser.add_argument("--one", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args.images)))
        return
    try:
        from scipy import linalg  # noqa: F401

        peers = ["frechet, scipy sqrtm"]
    except ImportError:
        peers = []
    frechet = measure(["frechet, genkit", *peers], args.images, args.repeats, args.threads)
    near = measure(list(KINDS)[2:], args.images, args.repeats, args.threads)
    large = measure(["neighbours, genkit (4 metrics)"], 50_000, 1, args.threads) if args.large else {}
    failed = missed(frechet, near, large)
    if args.out:
        sizes = {"columns": WIDTH, "images": args.images, "threads": args.threads, "repeats": args.repeats}
        result = {"frechet": frechet, "neighbours": near, "neighbours_50k": large, "missed": failed}
        save(args.out, "benchmarks/eval_speed.py" + (" --large" if args.large else ""), {**sizes, **result})
    if failed:
        raise SystemExit(f"missed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
