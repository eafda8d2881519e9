"""What minority guidance does to the distribution of minority scores, with the built-in model; keeps run file and plot.

    python benchmarks/minority.py [--images 2000]

The score is the one the classifier's levels were cut from: how far, in the features of the built-in CIFAR-10 classifier, the
diffusion model lands when it restores an image from noise. A level is a tenth of the training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from genkit_eval.report.plots import distributions
from record import save
from torch import Tensor

import genkit
from genkit.guidance.minority import minority_score
from genkit.models.classifier import load_builtin
from genkit.models.minority import feature_distance
from genkit.random import Keyed
from genkit.training.minority import STREAM

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDANCES = (
    "none",
    "MinorityGuidance(3.0, level=0)",
    "MinorityGuidance(3.0)",
    "MinorityGuidance(6.0)",
    "SelfMinority(1.05)",
    "CFG(3.0)",
    "Sum(CFG(3.0), MinorityGuidance(6.0))",
)


def restored(pipe: Any, recipe: dict[str, Any], images: Tensor, labels: list[int]) -> Tensor:
    """Minority scores (N,) of uint8 images, by the rule of the recipe."""
    distance, parts = feature_distance(load_builtin()), torch.arange(len(images)).split(250)
    found = []
    for part in parts:
        noise = Keyed(part.tolist(), STREAM)
        drawn = lambda like, draw, noise=noise: noise(like, recipe["seed"], draw)  # noqa: E731
        x, y = images[part].float() / 127.5 - 1, torch.tensor(labels)[part]
        found.append(minority_score(pipe.models["main"], x, y, recipe["sigma"], drawn, recipe["draws"], distance))
    return torch.cat(found).double()


def shift(scores: Tensor, base: Tensor, quantiles: list[float], rounds: int = 1000) -> dict[str, Any]:
    """Mean, its change from ``base`` on the same seeds with a 95 % bootstrap interval, shares in the outermost levels."""
    g = torch.Generator().manual_seed(0)
    change = scores - base
    drawn = torch.stack([change[torch.randint(len(change), (len(change),), generator=g)].mean() for _ in range(rounds)])
    interval = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    rare, common = (scores > quantiles[-2]).double().mean(), (scores <= quantiles[0]).double().mean()
    told = {"mean": float(scores.mean()), "change": float(change.mean()), "interval": interval}
    return told | {"rarest_tenth": float(rare), "commonest_tenth": float(common)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default=str(DOCS / "runs" / "minority.json"))
    parser.add_argument("--plot", type=Path, default=DOCS / "images" / "minority.png")
    args = parser.parse_args()
    pipe = genkit.load("builtin/cifar10")
    about = json.loads(pipe.models["minority"].metadata["about"])
    classes, seeds = [k % 10 for k in range(args.images)], list(range(args.images))
    scores, rows = {}, []
    with torch.no_grad():
        for text in GUIDANCES:
            out = pipe(classes, seeds, text, sampler=args.sampler, steps=args.steps, batch_size=250, progress=True)
            scores[text] = restored(pipe, about["recipe"], out.pixels, classes)
            told = shift(scores[text], scores["none"], about["quantiles"])
            rows.append({"guidance": text, "nfe": sum(out.nfe) / len(out.nfe), **told})
            print(rows[-1])
    args.plot.write_bytes(distributions({t: s.tolist() for t, s in scores.items()}, "minority score", about["quantiles"]))
    result = {"images": args.images, "sampler": args.sampler, "steps": args.steps, "recipe": about["recipe"], "rows": rows}
    save(args.out, {**result, "quantiles": about["quantiles"]})


if __name__ == "__main__":
    main()
