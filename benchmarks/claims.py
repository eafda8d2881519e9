"""The papers' claims, measured with the built-in model: runs genkit-eval and keeps the numbers in docs/runs/.

    python benchmarks/claims.py [--num-samples 5000] [--parts 2]

An interrupted run goes on where it was. ``python benchmarks/results_page.py`` writes docs/results.md from what is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compare import HIGH, LOW, generate, keep, options

GUIDANCES = (
    "none",
    "CFG(1.5)",
    "CFG(2.0)",
    "CFG(3.0)",
    "CFG(5.0)",
    "CFG(8.0)",
    f"Interval(CFG(3.0), {LOW}, {HIGH})",
    f"Interval(CFG(5.0), {LOW}, {HIGH})",
    f"Interval(CFG(8.0), {LOW}, {HIGH})",
    "APG(5.0)",
    "APG(8.0)",
    f"Interval(APG(8.0), {LOW}, {HIGH})",
    "Adaptive(CFG(3.0), 0.991)",
    "Adaptive(CFG(3.0), 0.995, measure='x0')",
    "Scheduled(CFG(3.0), 'linear')",
    "Scheduled(CFG(3.0), 'cosine')",
    "Scheduled(CFG(3.0), 'lambda')",
)

#: (what is said, by whom, the method, what it is compared with, [(metric or cost, direction that agrees with the paper)])
CLAIMS: tuple[tuple[str, str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "A limited interval lowers the Frechet distance, at fewer evaluations",
        "Kynkaanniemi et al. 2024",
        f"Interval(CFG(3.0), {LOW}, {HIGH})",
        "CFG(3.0)",
        (("frechet", "lower"), ("nfe", "lower")),
    ),
    (
        "The same at a high scale",
        "Kynkaanniemi et al. 2024",
        f"Interval(CFG(8.0), {LOW}, {HIGH})",
        "CFG(8.0)",
        (("frechet", "lower"), ("nfe", "lower")),
    ),
    (
        "APG raises recall at high scales and lowers saturation",
        "Sadat et al. 2024",
        "APG(8.0)",
        "CFG(8.0)",
        (("recall", "higher"), ("saturation", "lower"), ("frechet", "lower")),
    ),
    (
        "The same at a moderate scale",
        "Sadat et al. 2024",
        "APG(5.0)",
        "CFG(5.0)",
        (("recall", "higher"), ("saturation", "lower"), ("frechet", "lower")),
    ),
    (
        "The two compose: APG inside an interval against CFG",
        "(genkit)",
        f"Interval(APG(8.0), {LOW}, {HIGH})",
        "CFG(8.0)",
        (("frechet", "lower"), ("recall", "higher"), ("nfe", "lower")),
    ),
    (
        "Adaptive guidance keeps the Frechet distance at about 25 % fewer evaluations",
        "Castillo et al. 2023",
        "Adaptive(CFG(3.0), 0.995, measure='x0')",
        "CFG(3.0)",
        (("frechet", "equal"), ("nfe", "a quarter lower")),
    ),
    (
        "The same by the paper's rule (eps, 0.991)",
        "Castillo et al. 2023",
        "Adaptive(CFG(3.0), 0.991)",
        "CFG(3.0)",
        (("frechet", "equal"), ("nfe", "a quarter lower")),
    ),
    (
        "A rising schedule with the same mean scale is better than a constant one",
        "Wang et al. 2024",
        "Scheduled(CFG(3.0), 'linear')",
        "CFG(3.0)",
        (("frechet", "lower"), ("recall", "higher")),
    ),
    (
        "The same, rising as a cosine",
        "Wang et al. 2024",
        "Scheduled(CFG(3.0), 'cosine')",
        "CFG(3.0)",
        (("frechet", "lower"), ("recall", "higher")),
    ),
)


def paired(out: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """For every claim, the differences with their paired bootstrap intervals."""
    from genkit_eval.score import difference

    entries = {entry["label"]: entry for entry in results["guidances"]}
    scores = {label: json.loads((out / e["slug"] / "scores.json").read_text())["metrics"] for label, e in entries.items()}
    found = []
    for claim, source, method, baseline, expected in CLAIMS:
        rows = []
        for name, direction in expected:
            if name == "nfe":
                ours, theirs = (entries[label]["cost"]["nfe_mean"] for label in (method, baseline))
                rows.append({"metric": "nfe", "expected": direction, "value": ours / theirs - 1, "interval": None})
            else:
                change = difference(scores[method][name], scores[baseline][name])
                assert change is not None
                score = scores[baseline][name]
                about = {"base": score["value"], "interval_of": score["interval_of"]}
                rows.append({"metric": name, "expected": direction, **about, **change})
        found.append({"claim": claim, "source": source, "method": method, "baseline": baseline, "rows": rows})
    return found


def main() -> None:
    args = options(__doc__, "claims", 5000)
    results = generate(GUIDANCES, args.num_samples, args.out, args.parts)
    results["claims"] = paired(args.out, results)
    keep(args.keep, results, "claims.py", args.num_samples)


if __name__ == "__main__":
    main()
