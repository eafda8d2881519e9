"""Attention: every backend at the shapes that genkit's models have, and whether the default choice is the best of them.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/attention.py [--out docs/runs/attention.json]

Backends run in turns; a figure is the least of several rounds, in CPU seconds, or by CUDA events where there is a GPU (then with
the share of its arithmetic or memory limit that is reached; give the limits with --tflops and --gbs). Exits with an error if the
default choice is more than 5 % slower than the best exact backend at any shape.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save
from torch import Tensor

from genkit.attention import BACKENDS, BlockCausal, Mask, Tree, Unavailable, attention
from genkit.attention.choice import AUTO, reason

SCALES = tuple(p * p for p in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
WITHIN = 1.05
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """q (2, heads, queries, width) and k, v (2, heads, keys, width)."""

    heads: int
    width: int
    queries: int
    keys: int
    mask: Mask | None = None

    @property
    def flops(self) -> int:
        seen = self.queries * self.keys
        if isinstance(self.mask, BlockCausal):
            seen = sum((end - begin) * keys for begin, end, keys in self.mask.parts(self.queries, self.keys))
        return 4 * 2 * self.heads * self.width * seen

    def bytes(self, size: int) -> int:
        return 2 * 2 * self.heads * self.width * (self.queries + self.keys) * size


def tree(nodes: int) -> Tree:
    """Four children of what stands before, and of the earliest nodes, as EAGLE's are."""
    return Tree(tuple((i - 4) // 4 if i >= 4 else -1 for i in range(nodes)))


CASES = {
    "DiT-XL, 256 tokens": Case(16, 72, 256, 256),
    "DiT-XL, 1024 tokens": Case(16, 72, 1024, 1024),
    "VAR-d16, 680 tokens, block-causal": Case(16, 64, 680, 680, BlockCausal(SCALES)),
    **{f"VAR-d16, cached, scale of {SCALES[i]}": Case(16, 64, SCALES[i], sum(SCALES[: i + 1])) for i in (0, 4, 7, 9)},
    **{f"LlamaGen-B, tree of {n}": Case(12, 64, n, 256 + n, tree(n)) for n in (1, 2, 4, 8, 16, 32, 64)},
}


def calls(case: Case, dtype: torch.dtype, device: str, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """What each backend that can do the case is called by; the default first."""
    g = torch.Generator().manual_seed(0)
    lengths = (case.queries, case.keys, case.keys)
    q, k, v = (torch.randn(2, case.heads, n, case.width, generator=g).to(device, dtype) for n in lengths)
    found: dict[str, Callable[[], Tensor]] = {}
    for name in (AUTO, *names):

        def call(name: str = name) -> Tensor:
            return attention(q, k, v, mask=case.mask, backend=name)

        try:
            call()
        except Unavailable:
            continue
        found[name] = call
    return found


def clock(call: Callable[[], Tensor], times: int, cuda: bool) -> float:
    """Seconds of one call, the mean over some in a row."""
    if not cuda:
        begin = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - begin) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


@torch.no_grad()
def measure(case: Case, dtype: torch.dtype, device: str, names: list[str], rounds: int) -> dict[str, float]:
    """Seconds of each. Rounds are added while the default looks too slow: noise passes, a bad choice does not."""
    ways, cuda, best = calls(case, dtype, device, names), device == "cuda", dict[str, float]()
    once = {name: clock(call, 1, cuda) for name, call in ways.items()}
    for i in range(4 * rounds):
        for name, call in ways.items():
            if once[name] > 20 * min(once.values()) and i > 1:  # it will not be the best
                continue
            seconds = clock(call, max(1, int(0.02 / once[name])), cuda)
            best[name] = min(best.get(name, float("inf")), seconds)
        if i + 1 >= rounds and best[AUTO] <= WITHIN * least(best):
            break
    return best


def least(seconds: dict[str, float]) -> float:
    """Of the exact backends."""
    return min(value for name, value in seconds.items() if name == AUTO or BACKENDS[name].exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", help="default: all that can be used here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tflops", type=float, help="arithmetic limit of the GPU at bfloat16")
    parser.add_argument("--gbs", type=float, help="memory limit of the GPU, GB/s")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.backends or [name for name in BACKENDS if reason(name) is None]
    rows, failed = list[dict[str, Any]](), list[str]()
    for title, case in CASES.items():
        for kind, dtype in DTYPES.items():
            seconds = measure(case, dtype, args.device, names, args.rounds)
            ratio = seconds[AUTO] / least(seconds)
            row: dict[str, Any] = {"case": title, "dtype": kind, "seconds": seconds, "default_over_best": ratio}
            if args.tflops and args.gbs:
                limit = max(case.flops / args.tflops / 1e12, case.bytes(dtype.itemsize) / args.gbs / 1e9)
                row["share_of_limit"] = limit / seconds[AUTO]
            rows.append(row)
            print(f"{title}, {kind}: " + ", ".join(f"{n} {s * 1e3:.3f} ms" for n, s in seconds.items()), flush=True)
            failed += [f"{title}, {kind}: the default takes {ratio:.2f} of the best"] if ratio > WITHIN else []
    if args.out:
        about = {"rows": rows, "backends": names, "device": args.device, "rounds": args.rounds}
        save(args.out, about)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
