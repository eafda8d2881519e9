"""The papers' claims, measured with the built-in model: runs genkit-eval and keeps the numbers in docs/runs/.

    python benchmarks/claims.py [--num-samples 5000] [--parts 2]

``--parts N`` makes the images in N single-threaded processes first (finished blocks are shared), then scores them in one.
An interrupted run goes on where it was. ``python benchmarks/results_page.py`` writes docs/results.md from what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLER, STEPS, LOW, HIGH = "dpmpp_2m", 10, 0.28, 5.42

GUIDANCES = (
    "none",
    "CFG(1.5)",
    "CFG(2.0)",
    "CFG(3.0)",
    "CFG(5.0)",
    f"Interval(CFG(3.0), {LOW}, {HIGH})",
    f"Interval(CFG(5.0), {LOW}, {HIGH})",
    "APG(5.0)",
    f"Interval(APG(5.0), {LOW}, {HIGH})",
    "Adaptive(CFG(3.0), 0.991)",
    "Adaptive(CFG(3.0), 0.995, measure='x0')",
    "Scheduled(CFG(3.0), 'linear')",
    "Scheduled(CFG(3.0), 'cosine')",
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
        f"Interval(CFG(5.0), {LOW}, {HIGH})",
        "CFG(5.0)",
        (("frechet", "lower"), ("nfe", "lower")),
    ),
    (
        "APG raises recall at high scales and lowers saturation",
        "Sadat et al. 2024",
        "APG(5.0)",
        "CFG(5.0)",
        (("recall", "higher"), ("saturation", "lower"), ("frechet", "lower")),
    ),
    (
        "The two compose: APG inside an interval against CFG",
        "(genkit)",
        f"Interval(APG(5.0), {LOW}, {HIGH})",
        "CFG(5.0)",
        (("frechet", "lower"), ("recall", "higher"), ("nfe", "lower")),
    ),
    (
        "Adaptive guidance keeps the Frechet distance at about 25 % fewer evaluations",
        "Castillo et al. 2023",
        "Adaptive(CFG(3.0), 0.995, measure='x0')",
        "CFG(3.0)",
        (("frechet", "equal"), ("nfe", "lower")),
    ),
    (
        "A rising schedule with the same mean scale is better than a constant one",
        "Wang et al. 2024",
        "Scheduled(CFG(3.0), 'linear')",
        "CFG(3.0)",
        (("frechet", "lower"), ("recall", "higher")),
    ),
    (
        "The same for the cosine schedule",
        "Wang et al. 2024",
        "Scheduled(CFG(3.0), 'cosine')",
        "CFG(3.0)",
        (("frechet", "lower"), ("recall", "higher")),
    ),
)


def command(guidances: tuple[str, ...], samples: int, out: Path) -> list[str]:
    wanted = [part for text in guidances for part in ("--guidance", text)]
    sizes = ["--num-samples", str(samples), "--block-size", "100", "--sampler", SAMPLER, "--steps", str(STEPS)]
    return [sys.executable, "-m", "genkit_eval", "run", "--model", "builtin/cifar10", "--out", str(out), *sizes, *wanted]


def generate(samples: int, out: Path, parts: int) -> None:
    """Images and scores of all guidances in ``out``; every block that exists is kept."""
    if parts > 1:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        jobs = [command(GUIDANCES[part::parts], samples, out / f"part{part}") for part in range(parts)]
        processes = [subprocess.Popen(job, env=environment) for job in jobs]
        if any(process.wait() for process in processes):
            raise SystemExit("a part failed; see above. Run the same command again to go on.")
        out.mkdir(parents=True, exist_ok=True)
        for part in range(parts):
            for folder in sorted((out / f"part{part}").glob("*/blocks")):
                target = out / folder.parent.name
                if not target.exists():
                    folder.parent.rename(target)
    subprocess.run(command(GUIDANCES, samples, out), check=True)


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
                rows.append({"metric": name, "expected": direction, "base": scores[baseline][name]["value"], **change})
        found.append({"claim": claim, "source": source, "method": method, "baseline": baseline, "rows": rows})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--keep", type=Path, default=ROOT / "docs" / "runs" / "claims.json")
    args = parser.parse_args()
    generate(args.num_samples, args.out, args.parts)
    results = json.loads((args.out / "results.json").read_text())
    for entry in results["guidances"]:
        entry.pop("trace")
    results["claims"] = paired(args.out, results)
    results["command"] = f"python benchmarks/claims.py --num-samples {args.num_samples}"
    args.keep.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
