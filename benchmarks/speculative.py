"""Speculative decoding of the built-in next-token model: speed, accepted length and image quality over k and delta of LANTERN.

    python benchmarks/speculative.py [--num-samples 2000] [--parts 2] [--timed 16]

Images are compared as elsewhere, on shared seeds. Speed is measured apart: one image at a time, all rules in turn on the
same seeds, so that noise of the machine meets all of them alike; the ratio is that of the sums of CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from compare import generate, keep, options

import genkit

MODEL, GUIDANCE = "builtin/cifar10-next-token", "CFG(2.0)"
DYNAMIC = "tree=DynamicTree(20, 4, 5)"
#: Random draws of the drafter in a chain of four; then the trees of its most probable tokens, which LANTERN was measured with.
RULES = (
    None,
    "True",
    *(f"Lantern(k={k}, delta={delta})" for k in (10, 100, 1000) for delta in (0.05, 0.2, 0.4)),
    "Lantern(k=100, delta=None, factor=2.0)",
    f"Speculative({DYNAMIC})",
    f"Speculative(Lantern(k=100, delta=0.2), {DYNAMIC})",
    f"Speculative(Lantern(k=1000, delta=0.4), {DYNAMIC})",
    "Speculative(drafter='ngram')",
)


def timed(count: int) -> dict[str | None, dict[str, float]]:
    """CPU seconds an image, passes of the target, and mean accepted length, by rule."""
    torch.set_num_threads(1)
    pipe = genkit.load(MODEL)
    found: dict[str | None, dict[str, float]] = {rule: {"seconds": 0.0, "passes": 0.0} for rule in RULES}
    for seed in range(-1, count):  # the first of all warms up
        for rule, sums in found.items():
            began = time.process_time()
            asked: Any = True if rule == "True" else rule
            out = pipe([seed % 10], [10_000 + seed], GUIDANCE, speculative=asked, trace="none")
            if seed >= 0:
                sums["seconds"] += (time.process_time() - began) / count
                sums["passes"] += (pipe.steps if out.speculation is None else 1 + float(out.speculation.passes[0])) / count
    for sums in found.values():  # the first token comes from the pass that nothing is drafted for
        sums["length"] = (pipe.steps - 1) / (sums["passes"] - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--timed", type=int, default=16, help="images that are timed")
    args = options(__doc__, "speculative", 2000, parser)
    entries: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None
    for rule in RULES:
        sampler = "next_token" if rule is None else f"next_token(speculative={rule if rule == 'True' else repr(rule)})"
        name = "plain" if rule is None else "".join(c if c.isalnum() else "-" for c in rule)
        run = generate((GUIDANCE,), args.num_samples, args.out / name, args.parts, sampler=sampler, steps=None, model=MODEL)
        results = results or run
        entries.append({**run["guidances"][0], "rule": rule})
    speed = timed(args.timed)
    for entry in entries:
        own = speed[entry["rule"]]
        entry |= {**own, "speedup": speed[None]["seconds"] / own["seconds"]}
    assert results is not None
    results |= {"guidances": entries, "timed": args.timed}
    keep(args.keep, results, "speculative.py", args.num_samples)


if __name__ == "__main__":
    main()
