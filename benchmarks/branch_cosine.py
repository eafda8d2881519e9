"""How far the two branches agree along a guided run: the cosine of eps_c and eps_u, and of D_c and D_u, at every step.

python benchmarks/branch_cosine.py [--out docs/runs/branch_cosine.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from record import save

import genkit
from genkit.guidance import CFG, Result, StepInfo
from genkit.guidance.adaptive import branch_cosine


@dataclass(frozen=True)
class _Watched(CFG):
    """CFG that writes down what it sees."""

    seen: list[dict[str, Any]] = field(default_factory=list, hash=False, compare=False)

    def rule(self, info: StepInfo, predictions: Mapping[str, torch.Tensor], state: Any) -> tuple[Result, Any]:
        row: dict[str, Any] = {"sigma": info.sigma}
        for measure in ("eps", "x0"):
            cosine = branch_cosine(info, predictions["cond"], predictions["uncond"], measure).double()
            row[measure] = cosine.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        self.seen.append(row)
        return super().rule(info, predictions, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="docs/runs/branch_cosine.json")
    args = parser.parse_args()
    pipe, rule = genkit.load("builtin/cifar10"), _Watched(3.0)
    pipe([k % 10 for k in range(args.images)], list(range(args.images)), rule, sampler="dpmpp_2m", steps=args.steps)
    save(args.out, {"images": args.images, "guidance": "CFG(3.0)", "rows": rule.seen})


if __name__ == "__main__":
    main()
