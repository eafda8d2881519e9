"""The picture in the README: ten samples of each class of the built-in model.

python benchmarks/pictures.py [--guidance "CFG(2.0)"]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genkit_eval.report.grid import class_grid

import genkit

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--guidance", default="CFG(2.0)")
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--steps", type=int, default=18)
    args = parser.parse_args()
    pipe = genkit.load("builtin/cifar10")
    classes = [k // 10 for k in range(100)]
    out = pipe(classes, list(range(100)), args.guidance, sampler=args.sampler, steps=args.steps, progress=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    class_grid(out.pixels, out.classes, pipe.class_names).save(IMAGES / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
