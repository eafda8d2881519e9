"""The pictures of README and docs: ten samples of each class of a built-in model, and every guidance on the same seeds.

python benchmarks/pictures.py [--model builtin/cifar10] [--guidance "CFG(2.0)"] [--methods]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genkit_eval.report.grid import class_grid, same_seeds
from methods import METHODS, SAMPLER

import genkit

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BUILTIN = "builtin/cifar10"


def class_sheet(model: str, guidance: str, **options: Any) -> None:
    """Ten images of each class; the options are those of diffusion."""
    pipe = genkit.load(model)
    out = pipe([k // 10 for k in range(100)], list(range(100)), guidance, progress=True, **options)
    name = f"samples{model.removeprefix(BUILTIN).replace('-', '_')}.png"
    class_grid(out.pixels, out.classes, pipe.class_names).save(IMAGES / name, optimize=True)


def method_sheet(pipe: genkit.ClassPipeline, steps: int) -> None:
    """One row a guidance, one column a seed and class: what differs in a column is the guidance alone."""
    classes, seeds = [1, 8, 0, 7, 9, 4, 3, 5, 2, 6, 8, 7], list(range(12))
    rows = []
    for text in METHODS:
        rows.append((text, pipe(classes, seeds, text, sampler=SAMPLER, steps=steps).pixels))
    same_seeds(rows, columns=len(seeds)).save(IMAGES / "guidance.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=BUILTIN, help="a built-in model")
    parser.add_argument("--guidance", default="CFG(2.0)")
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--methods", action="store_true", help="draw the sheet of all methods instead")
    args = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    if args.methods:
        method_sheet(genkit.load(BUILTIN), args.steps)
    else:
        options = {"sampler": args.sampler, "steps": args.steps} if args.model == BUILTIN else {}
        class_sheet(args.model, args.guidance, **options)


if __name__ == "__main__":
    main()
