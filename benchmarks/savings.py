"""Does a skipped evaluation save time? CPU seconds per image against network rows per image, with the built-in model.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/savings.py [--out docs/runs/savings.json]

Every run of a guidance stands between two runs of CFG in one process. A time share is the median over the rounds of its CPU time
over the mean of those two, so that a machine whose speed drifts does not matter. Exits with an error if a time share is
more than 10 % away from the share of CFG's network rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save

import genkit

GUIDANCES = (
    "CFG(3.0)",
    "none",
    "Interval(CFG(3.0), 0.28, 5.42)",
    "Interval(CFG(3.0), 0.1, 20.0)",
    "Adaptive(CFG(3.0), 0.995, measure='x0')",
    "Adaptive(CFG(3.0), 0.95, measure='x0')",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=0.10)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = genkit.load("builtin/cifar10")
    classes, seeds = [k % 10 for k in range(args.batch)], list(range(args.batch))
    times: dict[str, list[float]] = {text: [] for text in GUIDANCES}
    shares: dict[str, list[float]] = {text: [] for text in GUIDANCES}
    rows = dict.fromkeys(GUIDANCES, 0.0)

    def run(text: str) -> float:
        start = time.process_time()
        out = pipe(classes, seeds, text, sampler="dpmpp_2m", steps=args.steps)
        times[text].append(time.process_time() - start)
        rows[text] = sum(out.nfe) / len(out.nfe)
        return times[text][-1]

    for _ in range(args.repeats):
        before = run("CFG(3.0)")
        for text in GUIDANCES[1:]:
            own, after = run(text), run("CFG(3.0)")
            shares[text].append(2 * own / (before + after))
            before = after
    shares["CFG(3.0)"] = [1.0]
    table, far = {}, []
    for text in GUIDANCES:
        share = {"rows": rows[text] / rows["CFG(3.0)"], "time": statistics.median(shares[text])}
        table[text] = {"ms_per_image": min(times[text]) / args.batch * 1e3, "rows_per_image": rows[text], "share": share}
        error = share["time"] / share["rows"] - 1
        far += [text] if abs(error) > args.tolerance else []
        cost = f"{table[text]['ms_per_image']:7.2f} ms/image  {rows[text]:6.2f} rows"
        print(f"{cost}  share of CFG: rows {share['rows']:.3f}, time {share['time']:.3f} ({error:+.1%})  {text}")
    if args.out:
        save(
            args.out,
            {"guidances": table, "batch": args.batch, "steps": args.steps, "repeats": args.repeats},
        )
    if far:
        raise SystemExit(f"time is not in proportion to rows within {args.tolerance:.0%}: {', '.join(far)}")


if __name__ == "__main__":
    main()
