"""Low-rank attention for bounded entries: its error, where it takes less time, and whether trained networks are bounded enough.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/low_rank.py [--out docs/runs/low_rank.json]

Of times, the minimum of several interleaved runs in CPU seconds, the probe of the bound included.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save
from torch import Tensor
from torch.nn import functional as F

import genkit
from genkit.attention import BACKENDS, AttentionBackend, register_backend, use_attention
from genkit.attention.low_rank import Bounded, bounded_entries, break_even, error_bound, low_rank_attention, rank

TOLERANCE = 1e-2
#: Head size, degree, and the lengths to time at.
TIMED = (
    (16, 1, (64, 128, 256, 512, 1024)),
    (16, 2, (128, 256, 512, 1024, 2048)),
    (64, 1, (64, 128, 256, 512, 1024, 2048)),
    (64, 2, (1024, 2048, 4096, 8192)),
)


def draw(tokens: int, d: int, limit: float, heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of unit length with scores up to ``limit`` (at most), scale 1; v normal."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, d, generator=source, dtype=dtype) for _ in range(3))
    return F.normalize(q, dim=-1) * limit, F.normalize(k, dim=-1), v


def errors(d: int = 64, tokens: int = 680) -> list[dict[str, float]]:
    """Largest error and its bound, over the largest possible score and the degree."""
    lines = []
    for limit in (0.1, 0.3, 1.0, 2.0, 4.0, 10.0):
        q, k, v = draw(tokens, d, limit, dtype=torch.float64)
        exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        probe = bounded_entries(q, k - k.mean(-2, keepdim=True), 1.0)
        spread = float((v.amax(-2) - v.amin(-2)).max()) / 2
        for degree in (1, 2):
            out = low_rank_attention(q, k, v, degree=degree, scale=1.0, tolerance=math.inf)
            bound = error_bound(probe.limit, degree, spread, probe.square)
            line = {"limit": limit, "score": probe.score, "degree": degree, "rank": rank(d, degree), "tokens": tokens}
            bounded = None if math.isinf(bound) else bound
            lines.append({**line, "error": float((out - exact).abs().max()), "bound": bounded, "output": float(exact.std())})
    return lines


def best_of(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, the minimum over interleaved runs."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def times(repeats: int) -> list[dict[str, Any]]:
    """Of both ways at each length, and the length from which low rank takes less time (None: at no measured one)."""
    lines = []
    for d, degree, lengths in TIMED:
        measured = []
        for tokens in lengths:
            q, k, v = draw(tokens, d, 0.01)
            calls = {
                "exact": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
                "low_rank": lambda q=q, k=k, v=v, g=degree: low_rank_attention(q, k, v, degree=g, scale=1.0, tolerance=math.inf),
            }
            measured.append({"tokens": tokens, **best_of(calls, repeats)})
        wins = [m["low_rank"] < m["exact"] for m in measured]
        first = next((m["tokens"] for i, m in enumerate(measured) if all(wins[i:])), None)
        about = {"head_size": d, "degree": degree, "rank": rank(d, degree), "multiplications": break_even(d, degree)}
        lines.append({**about, "first_faster": first, "times": measured})
    return lines


@contextmanager
def recorded() -> Iterator[list[Bounded]]:
    """Inside, every call of attention without a mask is probed, as the low-rank backend does it."""
    found: list[Bounded] = []

    class Probe(AttentionBackend):
        name = "probe"

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
            if mask is None and k.shape[2] > 1:
                found.append(bounded_entries(q, k - k.mean(-2, keepdim=True), scale))
            return BACKENDS["sdpa"](q, k, v, mask, scale)

    register_backend(Probe())
    try:
        with use_attention("probe"):
            yield found
    finally:
        BACKENDS.pop("probe")


def networks() -> list[dict[str, Any]]:
    """How large scores are in the built-in models, over all layers and steps, and which calls low rank would do."""
    lines = []
    runs: dict[str, dict[str, Any]] = {
        "builtin/cifar10": {"steps": 8, "sampler": "dpmpp_2m"},
        "builtin/cifar10-next-scale": {},
        "builtin/cifar10-next-token": {},
    }
    for model, options in runs.items():
        pipe = genkit.load(model)
        with recorded() as found:
            pipe(classes=[0, 1, 2, 3], seeds=[0, 1, 2, 3], guidance="CFG(3.0)", **options)
        scores = torch.tensor([b.score for b in found])
        low, middle, high = scores.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        kept = {
            f"degree_{g}": sum(error_bound(b.limit, g, 1.0, b.square) <= TOLERANCE for b in found) / len(found) for g in (1, 2)
        }
        entry = {"entry": max(b.entry for b in found), "smallest": float(scores.min()), "largest": float(scores.max())}
        line = {"model": model, "calls": len(found), "score": [low, middle, high], **entry}
        lines.append({**line, "within_tolerance": kept})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        result = {"tolerance": TOLERANCE, "errors": errors(), "networks": networks(), "times": times(args.repeats)}
    result["load_average"] = os.getloadavg()[0]
    for name, lines in result.items():
        for line in lines if isinstance(lines, list) else [lines]:
            print(name, line)
    if args.out:
        save(args.out, result)


if __name__ == "__main__":
    main()
