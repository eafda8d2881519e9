"""Fit LinearAG to a model and keep its coefficients: ``python -m genkit.training.linear_ag --scale 3 --out linear_ag.json``.

The expression it prints is complete: it needs no file where it is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genkit.guidance.linear_ag import LinearAG
from genkit.pipelines import load
from genkit.samplers.diffusion import find_sampler


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="builtin/cifar10", help="built-in name or checkpoint file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32, help="classes are taken in turn")
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="seeds are this and the following ones")
    parser.add_argument("--scale", type=float, required=True, help="w of the CFG that is approximated")
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--grid", help="noise levels; the sampler's own unless given")
    parser.add_argument("--every", type=int, default=2, help="evaluate the unconditional branch in every so many-th step ...")
    parser.add_argument("--until", type=float, default=0.5, help="... of this share of the steps, later in none")
    parser.add_argument("--history", type=int, default=2, help="earlier evaluations that an estimate reads")
    parser.add_argument("--follow", choices=["own", "cfg"], default="own", help="whose samples it is fitted on")
    parser.add_argument("--ridge", type=float, default=1e-9, help="pull towards reuse of the last difference")
    parser.add_argument("--digits", type=int, default=6, help="significant digits kept")
    parser.add_argument("--out", type=Path, help="JSON file to add the coefficients to")
    args = parser.parse_args(argv)
    pipe = load(args.model, device=args.device)
    classes = [i % pipe.num_classes for i in range(args.samples)]
    seeds = list(range(args.first_seed, args.first_seed + args.samples))
    names = ("sampler", "steps", "grid", "every", "until", "history", "follow", "ridge", "digits")
    options = {name: getattr(args, name) for name in names}
    made = LinearAG.fit(pipe, classes, seeds, args.scale, **options)
    print(made)
    if args.out:
        grid = args.grid or find_sampler(args.sampler).grid
        fitted = {name: options[name] for name in names[3:]}
        about = {"model": pipe.name, "fingerprint": pipe.fingerprint, "first_seed": args.first_seed, "samples": args.samples}
        made.save(args.out, sampler=str(find_sampler(args.sampler)), grid=grid, **about, **fitted)


if __name__ == "__main__":
    main()
