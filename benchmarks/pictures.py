"""The pictures of README and docs: ten samples of each class of the built-in model, and every guidance on the same seeds.

python benchmarks/pictures.py [--guidance "CFG(2.0)"] [--methods]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genkit_eval.report.grid import class_grid, same_seeds
from methods import METHODS, SAMPLER

import genkit

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def class_sheet(pipe: genkit.ClassPipeline, guidance: str, sampler: str, steps: int) -> None:
    out = pipe([k // 10 for k in range(100)], list(range(100)), guidance, sampler=sampler, steps=steps, progress=True)
    class_grid(out.pixels, out.classes, pipe.class_names).save(IMAGES / "samples.png", optimize=True)


def method_sheet(pipe: genkit.ClassPipeline, steps: int) -> None:
    """One row a guidance, one column a seed and class: what differs in a column is the guidance alone."""
    classes, seeds = [1, 8, 0, 7, 9, 4, 3, 5, 2, 6, 8, 7], list(range(12))
    rows = []
    for text in METHODS:
        rows.append((text, pipe(classes, seeds, text, sampler=SAMPLER, steps=steps).pixels))
    same_seeds(rows, columns=len(seeds)).save(IMAGES / "guidance.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--guidance", default="CFG(2.0)")
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--methods", action="store_true", help="draw the sheet of all methods instead")
    args = parser.parse_args()
    pipe = genkit.load("builtin/cifar10")
    IMAGES.mkdir(parents=True, exist_ok=True)
    if args.methods:
        method_sheet(pipe, args.steps)
    else:
        class_sheet(pipe, args.guidance, args.sampler, args.steps)


if __name__ == "__main__":
    main()
