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
SAMPLER, STEPS, LOW, HIGH = "dpmpp_2m", 8, 0.28, 5.42

GUIDANCES = (
    "none",
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
)


def command(guidances: tuple[str, ...], samples: int, out: Path) -> list[str]:
    wanted = [part for text in guidances for part in ("--guidance", text)]
    sizes = ["--num-samples", str(samples), "--block-size", "100", "--sampler", SAMPLER, "--steps", str(STEPS)]
    return [sys.executable, "-m", "genkit_eval", "run", "--model", "builtin/cifar10", "--out", str(out), *sizes, *wanted]


def generate(samples: int, out: Path, parts: int) -> None:
    """Images and scores of all guidances in ``out``; every block that exists is kept."""
    out.mkdir(parents=True, exist_ok=True)
    done = {entry["label"] for entry in finished(out)} if (out / "results.json").exists() else set()
    missing = tuple(text for text in GUIDANCES if text not in done)
    shares = [missing[part::parts] for part in range(parts)] if parts > 1 else []
    jobs = [command(share, samples, out / f"part{number}") for number, share in enumerate(shares) if share]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    processes = [subprocess.Popen(job, env=environment) for job in jobs]
    codes = [process.wait() for process in processes]  # every one, before giving up
    if any(codes):
        raise SystemExit("a part failed; see above. Run the same command again to go on.")
    for folder in sorted(out.glob("part*/*/blocks")):
        target = out / folder.parent.name
        if not target.exists():
            folder.parent.rename(target)
    subprocess.run(command(GUIDANCES, samples, out), check=True)


def finished(out: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["guidances"]
    return entries


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
    args.keep.parent.mkdir(parents=True, exist_ok=True)
    args.keep.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
