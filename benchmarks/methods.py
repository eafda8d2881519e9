"""Every guidance method at two or three strengths, with the built-in model: runs genkit-eval and keeps docs/runs/methods.json.

    python benchmarks/methods.py [--num-samples 2000] [--parts 2]

A method that corrects its steps needs another sampler than the rest; those stand in a group of their own, beside their peers.
"""

from __future__ import annotations

from typing import Any

from compare import HIGH, LOW, SAMPLER, generate, keep, options

#: One line per method; ``benchmarks/results_page.py`` keeps the order.
METHODS = (
    "none",
    *(f"CFG({w})" for w in (2.0, 3.0, 5.0)),
    *(f"Interval(CFG({w}), {LOW}, {HIGH})" for w in (3.0, 5.0)),
    *(f"Interval(CFG(5.0), {low}, {high})" for low, high in ((0.28, 20.0), (0.28, 80.0), (1.0, 80.0))),
    *(f"Scheduled(CFG(3.0), '{shape}')" for shape in ("linear", "cosine", "lambda")),
    *(f"Adaptive(CFG(3.0), {threshold}, measure='x0')" for threshold in (0.99, 0.995)),
    *(f"LinearAG({w})" for w in (3.0, 5.0)),
    *(f"ReuseDelta({w})" for w in (3.0, 5.0)),
    *(f"APG({w})" for w in (3.0, 5.0)),
    *(f"APG({w}, momentum=-0.5, threshold=5.0)" for w in (3.0, 5.0)),
    *(f"APGMix(CFG({w}), APG({w}), last=2)" for w in (3.0, 5.0)),
    *(f"FDG(({high}, {low}))" for high, low in ((4.0, 2.0), (7.0, 3.0))),
    *(f"TCFG({w})" for w in (3.0, 5.0)),
    *(f"RAAG({w})" for w in (5.0, 10.0)),
    *(f"SMC({w})" for w in (3.0, 5.0)),
    *(f"MomentumGuidance(CFG({w}), 1.5)" for w in (3.0, 5.0)),
    *(f"DynamicThresholding({w}, {mimic})" for w, mimic in ((5.0, 2.0), (8.0, 3.0))),
    *(f"Rescaled(CFG({w}), 0.7)" for w in (3.0, 5.0)),
    *(f"NormMatched(CFG({w}))" for w in (3.0, 5.0)),
    *(f"CFGZeroStar({w})" for w in (3.0, 5.0)),
    *(f"ZeroInit(CFG({w}))" for w in (3.0, 5.0)),
    *(f"CFGPP({strength})" for strength in (0.3, 0.6)),
    *(f"RectifiedCFGPP({w})" for w in (2.0, 3.0)),
    *(f"Autoguidance({w})" for w in (1.5, 2.0)),
    *(f"PAG({w})" for w in (2.0, 4.0)),
    *(f"SEG({w})" for w in (2.0, 4.0)),
    *(f"SLG({w})" for w in (2.0, 3.0)),
    *(f"CADS(CFG({w}))" for w in (3.0, 5.0)),
    *(f"ICG({w})" for w in (3.0, 5.0)),
    *(f"MinorityGuidance({w})" for w in (3.0, 6.0)),
    *(f"SelfMinority({w})" for w in (1.02, 1.05)),
    "Sum(CFG(3.0), PAG(2.0))",
    "Sum(CFG(2.0), Autoguidance(1.5))",
    f"Interval(Sum(CFG(3.0), APG(3.0)), {LOW}, {HIGH})",
)

#: Stochastic samplers: PCG, and the two between which theory puts it.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (SAMPLER, METHODS),
    ("pcg", ("PredictorCorrector(CFG(2.0))", "PredictorCorrector(CFG(3.0))")),
    ("ddim(eta=1.0)", ("CFG(2.0)", "CFG(3.0)")),
)


def main() -> None:
    args = options(__doc__, "methods", 2000)
    runs: list[dict[str, Any]] = []
    for number, (sampler, guidances) in enumerate(GROUPS):
        runs.append(generate(guidances, args.num_samples, args.out / f"group{number}", args.parts, sampler))
    results = runs[0]
    for (sampler, _), other in zip(GROUPS[1:], runs[1:], strict=True):
        results["guidances"] += [{**entry, "sampler": sampler} for entry in other["guidances"]]
    keep(args.keep, results, "methods.py", args.num_samples)


if __name__ == "__main__":
    main()
