"""Time and memory of genkit-eval beside its peers, which run in a virtual environment of their own as in eval_parity.py.

    python benchmarks/eval_speed.py [--threads 2] [--large] [--venv DIR] [--out docs/runs/eval_speed.json]

Frechet distance from two sets of statistics of 2048 columns: Cholesky and eigenvalues against scipy's matrix square root as
pytorch-fid calls it. Neighbours: precision, recall, density and coverage from tiles against torch-fidelity's precision and recall
from whole matrices of distances; ``--large`` also at 50,000 images, where its matrices are 28 GiB and it runs with save_cpu_ram.
Extraction: resize and network on images of 256 pixels, with seeded random weights. Every measurement is a process of its own;
kinds alternate, and the best of the repeats counts. Seconds of CPU are the steadier number on a machine that does other things.
Exits with an error where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eval_parity import EXTRACTOR, SEED, random_state
from eval_peers import KINDS as PEER_KINDS
from eval_peers import WIDTH, Peers, environment, features, measured, pictures
from genkit_eval.extractors import load_extractor
from genkit_eval.metrics import METRICS, Pair, Sample
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.moments import moments_of
from record import save

FOUR = ("precision", "recall", "density", "coverage")
LARGE = 50_000


def own_frechet(n: int, weights: str) -> Callable[[], Any]:
    first, second = (moments_of(features(n, seed)) for seed in (1, 2))
    return lambda: frechet_distance(first, second)


def own_neighbours(n: int, weights: str) -> Callable[[], Any]:
    real, fake = features(n, 1), features(n, 2)

    def run() -> dict[str, float]:
        pair = Pair(Sample(real), Sample(fake))
        return {name: METRICS[name].value(pair) for name in FOUR}

    return run


def own_extraction(n: int, weights: str) -> Callable[[], Any]:
    extractor = load_extractor(EXTRACTOR, weights=Path(weights), any_weights=True)
    pixels = pictures(n)
    return lambda: float(extractor(pixels)["features"].double().square().mean())


OWN_KINDS: dict[str, Callable[[int, str], Callable[[], Any]]] = {
    "frechet, genkit": own_frechet,
    "neighbours, genkit (4 metrics)": own_neighbours,
    "extraction, genkit": own_extraction,
}
FRECHET = ("frechet, genkit", "frechet, pytorch-fid (scipy sqrtm)")
NEIGHBOURS = ("neighbours, genkit (4 metrics)", "neighbours, torch-fidelity (2 metrics)")
SPARING = (NEIGHBOURS[0], "neighbours, torch-fidelity save_cpu_ram (2 metrics)")
EXTRACTION = ("extraction, genkit", "extraction, torch-fidelity")
PARTS = {"frechet": FRECHET, "neighbours": NEIGHBOURS, "extraction": EXTRACTION}


@dataclass(frozen=True)
class Bench:
    """Where the peers are, the weights file, and threads of each measurement."""

    peers: Peers
    weights: str
    threads: int

    def one(self, kind: str, n: int) -> dict[str, Any]:
        """Measured once, in a process of its own."""
        if kind in PEER_KINDS:
            return self.peers.ask("measure", threads=self.threads, kind=kind, n=n, weights=self.weights)
        command = [sys.executable, __file__, "--one", kind, self.weights, str(n), str(self.threads)]
        # Threads that wait do not count as seconds of CPU.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def measure(self, kinds: tuple[str, ...], n: int, repeats: int) -> dict[str, dict[str, Any]]:
        """Best of each kind, in alternation; kinds of peers that are not installed are left out."""
        here = [kind for kind in kinds if not any(peer in kind for peer in self.peers.lacking)]
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in here}
        for _ in range(repeats):
            for kind in here:
                found[kind].append(self.one(kind, n))
        best = {}
        for kind, runs in found.items():
            row = {"value": runs[0]["value"], **{key: min(r[key] for r in runs) for key in ("wall_s", "cpu_s")}}
            best[kind] = row = {**row, "extra_mib": max(r["extra_mib"] for r in runs)}
            took = f"{row['wall_s']:8.2f} s  {row['cpu_s']:8.2f} CPU s  {row['extra_mib']:7.0f} MiB"
            print(f"{n:6d}  {kind:52s} {took}  {row['value']}", flush=True)
        return best


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that do not hold."""
    checks = {}
    for part, size, most in (("neighbours", "10,000", 0.3), ("neighbours_50k", "50,000", 1)):
        row = found[part].get(NEIGHBOURS[0])
        checks[f"neighbours at {size} in {most:g} GiB"] = row is None or row["extra_mib"] <= most * 1024

    def pair(part: str, kinds: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        rows = found[part]
        return (rows[kinds[0]], rows[kinds[1]]) if kinds[1] in rows else None

    if both := pair("frechet", FRECHET):
        own, peer = both
        checks["Frechet distance 5 times as fast as sqrtm"] = peer["cpu_s"] >= 5 * own["cpu_s"]
        checks["Frechet distance equal to 1e-9"] = abs(own["value"] - peer["value"]) <= 1e-9 * peer["value"]
    if both := pair("neighbours", NEIGHBOURS):
        own, peer = both
        checks["four metrics no slower than torch-fidelity's two"] = own["cpu_s"] <= peer["cpu_s"]
        names = ("precision", "recall")
        checks["precision and recall as torch-fidelity's"] = all(abs(own["value"][k] - peer["value"][k]) < 1e-6 for k in names)
    if both := pair("extraction", EXTRACTION):
        own, peer = both
        checks["extraction 1.3 times as fast as torch-fidelity's"] = peer["cpu_s"] >= 1.3 * own["cpu_s"]
        checks["the same features"] = abs(own["value"] / peer["value"] - 1) <= 1e-4
    return [name for name, held in checks.items() if not held]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="rows of features")
    parser.add_argument("--pictures", type=int, default=128, help="images through the network")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="also 50,000 rows (minutes)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all")
    parser.add_argument("--venv", type=Path, help="folder of the peers' environment, made if new; default a temporary one")
    parser.add_argument("--out", default="")
    parser.add_argument("--one", nargs=4, metavar=("KIND", "WEIGHTS", "N", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, weights, n, threads = args.one
        torch.set_num_threads(int(threads))
        print(json.dumps(measured(OWN_KINDS[kind](int(n), weights))))
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights.pth"
        torch.save(random_state(SEED), weights)
        bench = Bench(environment(args.venv or Path(temporary) / "venv"), str(weights), args.threads)
        found = {part: dict[str, Any]() for part in (*PARTS, "neighbours_50k")}
        for part in args.parts:
            n = args.pictures if part == "extraction" else args.images
            found[part] = bench.measure(PARTS[part], n, args.repeats)
        if args.large:
            found["neighbours_50k"] = bench.measure(SPARING, LARGE, 1)
    failed = missed(found)
    if args.out:
        sizes = {"columns": WIDTH, "images": args.images, "pictures": args.pictures, "threads": args.threads}
        about = {"peers": bench.peers.versions, "not_installed": list(bench.peers.lacking), **sizes, "repeats": args.repeats}
        save(args.out, {**about, **found, "missed": failed})
    if failed:
        raise SystemExit(f"missed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
