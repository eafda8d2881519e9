"""Adaptive Guidance, LinearAG and CFG with fewer steps at equal evaluations: writes docs/runs/equal_nfe.json.

    python benchmarks/equal_nfe.py [--num-samples 2000] [--parts 2]

LinearAG's coefficients are fitted here, on seeds that the comparison does not use. The thresholds of Adaptive were chosen so that
its mean number of evaluations meets the budget.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from compare import HIGH, LOW, SAMPLER, generate, keep, options

import genkit
from genkit.guidance.linear_ag import LinearAG

SCALE, FIT_IMAGES, FIRST_SEED = 3.0, 64, 1_000_000


class Row(NamedTuple):
    """One line of the table: at about how many evaluations, in how many steps, and what."""

    budget: int
    steps: int
    guidance: str
    until: float | None = None  # LinearAG, fitted: evaluated in every other step of this share


CFG = f"CFG({SCALE})"
ROWS = (
    Row(16, 8, CFG),
    *(Row(12, *rest) for rest in ((6, CFG), (8, "", 1.0), (8, f"LinearAG({SCALE}, until=1.0)"), (8, f"ReuseDelta({SCALE})"))),
    Row(12, 8, f"Adaptive({CFG}, 0.985, measure='x0')"),
    *(Row(10, *rest) for rest in ((5, CFG), (8, "", 0.5), (8, f"LinearAG({SCALE})"), (8, f"Interval({CFG}, {LOW}, {HIGH})"))),
    Row(10, 8, f"Adaptive({CFG}, 0.9, measure='x0')"),
    Row(32, 16, CFG),
    *(Row(24, *rest) for rest in ((12, CFG), (16, "", 1.0), (16, f"LinearAG({SCALE}, until=1.0)"), (16, f"ReuseDelta({SCALE})"))),
    Row(24, 16, f"Adaptive({CFG}, 0.995, measure='x0')"),
)


def fitted(steps: int, until: float) -> str:
    """The expression of LinearAG with coefficients for this number of steps."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + FIT_IMAGES))
    pipe = genkit.load("builtin/cifar10")
    return str(LinearAG.fit(pipe, [s % 10 for s in seeds], seeds, SCALE, sampler=SAMPLER, steps=steps, until=until))


def main() -> None:
    args = options(__doc__, "equal_nfe", 2000)
    texts = {row: row.guidance if row.until is None else fitted(row.steps, row.until) for row in ROWS}
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in ROWS:
        groups[row.steps].append(row)
    results: dict[str, Any] = {}
    entries: dict[Row, dict[str, Any]] = {}
    for steps, rows in groups.items():
        wanted = tuple(texts[row] for row in rows)
        run = generate(wanted, args.num_samples, args.out / f"steps{steps}", args.parts, steps=steps)
        results = results or run
        entries |= dict(zip(rows, run["guidances"], strict=True))
    results["guidances"] = [{**entries[row], "budget": row.budget, "steps": row.steps, "until": row.until} for row in ROWS]
    results["scale"] = SCALE
    keep(args.keep, results, "equal_nfe.py", args.num_samples)


if __name__ == "__main__":
    main()
