"""Guidance on the built-in autoregressive models, and the fine-tuned one that needs none: writes docs/runs/autoregressive.json.

python benchmarks/autoregressive.py [--num-samples 2000] [--parts 2]

Of the next-scale model half as many.
"""

from __future__ import annotations

from typing import Any

from compare import generate, keep, options

#: LlamaGen guides late, VAR ever more: their own ways are among the rows. Intervals count tokens, or scales.
NEXT_TOKEN = (
    "none",
    *(f"CFG({w})" for w in (1.5, 2.0, 3.0, 5.0)),
    "Interval(CFG(2.0), 0, 32, 'step')",
    "Interval(CFG(2.0), 32, 64, 'step')",
    "Interval(CFG(3.0), 0, 32, 'step')",
    "Scheduled(CFG(2.0), 'linear')",
    "Scheduled(CFG(2.0), 'cosine')",
    *(f"Adaptive(CFG(2.0), {threshold}, measure='x0')" for threshold in (0.95, 0.99)),
    "Adaptive(CFG(3.0), 0.999, measure='x0')",
    "APG(2.0)",
)
NEXT_SCALE = (
    "none",
    *(f"CFG({w})" for w in (1.5, 2.0, 3.0)),
    *(f"Scheduled(CFG({w}), 'linear', preserve_mean=False)" for w in (2.5, 4.0)),
    "Interval(CFG(2.0), 0, 3, 'step')",
    "Interval(CFG(2.0), 2, 99, 'step')",
    *(f"Adaptive(CFG(2.0), {threshold}, measure='x0')" for threshold in (0.95, 0.99)),
    "APG(2.0)",
)
MODELS = (
    ("builtin/cifar10-next-token", NEXT_TOKEN),
    ("builtin/cifar10-next-token-cca", ("none",)),
    ("builtin/cifar10-next-scale", NEXT_SCALE),
)


def main() -> None:
    args = options(__doc__, "autoregressive", 2000)
    runs: list[dict[str, Any]] = []
    for model, guidances in MODELS:
        out = args.out / model.split("-", 1)[1]
        count = args.num_samples // 2 if model.endswith("scale") else args.num_samples
        runs.append(generate(guidances, count, out, args.parts, sampler=None, steps=None, model=model))
    results = runs[0]
    results["guidances"] = [
        {**e, "model": model, "model_sha256": run["generation"]["model_sha256"]}
        for (model, _), run in zip(MODELS, runs, strict=True)
        for e in run["guidances"]
    ]
    keep(args.keep, results, "autoregressive.py", args.num_samples)


if __name__ == "__main__":
    main()
