"""Search which guidance each step needs: ``python -m genkit.training.policy_search --model builtin/cifar10 --scale 3``.

Every step chooses between the conditional prediction, the unconditional one and CFG at a few scales (Castillo et al. 2023,
policy search). The choices are relaxed to a softmax, and the probabilities are trained through the sampler by gradient
descent on ``|x - x_cfg|^2 / |x_cond - x_cfg|^2 + cost * E[NFE] / NFE_cfg``: distance of the image to that of CFG in every step
(1 is what no guidance at all gives), and expected price. The temperature falls, so that in the end each step has made its
choice.

All choices are on one line, ``D_u + w (D_c - D_u)``: their mean is CFG at the mean weight, so one evaluation of both branches
serves them all. The network is run again in the backward pass instead of keeping its activations: an iteration takes about
the time of four CFG runs, and memory for one network evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from genkit import noise
from genkit.denoiser import Condition, Denoiser, Guided
from genkit.files import read_json, write_json
from genkit.guidance import CFG, COND, UNCOND, Branch, Guidance, NoGuidance, Result, StepInfo, parse
from genkit.guidance.base import Predictions, is_number
from genkit.guidance.piecewise import Piecewise
from genkit.pipelines import ClassPipeline, load
from genkit.random import Gaussian, check_seeds
from genkit.samplers.diffusion import find_sampler, sample, start

FORMAT = "genkit-policy-1"


@dataclass(frozen=True)
class Search:
    """What a search does; written beside its result.

    Attributes:
        scale: w of the CFG run whose images are the target.
        scales: CFG scales to choose from, beside 0 (unconditional) and 1 (conditional); () is 1 + (w - 1) {1/2, 1, 2}.
        sampler, steps, grid: as in a pipeline call; grid None is the sampler's own.
        cost: price of the whole run of CFG, in units of the error of no guidance. Larger means fewer evaluations.
        iterations: gradient steps (Adam).
        lr: their size.
        hot, cold: first and last temperature of the softmax, falling geometrically.
        batch: samples in one gradient step; taken in turn.
    """

    scale: float
    scales: tuple[float, ...] = ()
    sampler: str = "euler"
    steps: int = 18
    grid: str | None = None
    cost: float = 0.1
    iterations: int = 60
    lr: float = 0.2
    hot: float = 1.0
    cold: float = 0.1
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("scale", "cost", "lr", "hot", "cold"):
            value = getattr(self, name)
            if not is_number(value) or not abs(value) < 1e6 or (name != "scale" and value < (0 if name == "cost" else 1e-6)):
                raise ValueError(f"{name}={value!r} must be a {'' if name == 'scale' else 'positive '}number below 1e6")
        for name in ("steps", "iterations", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer from 1 on")
        for value in self.scales:
            if not is_number(value) or not abs(value) < 1e6:
                raise ValueError(f"scales={self.scales!r} must be numbers below 1e6")
        if self.cold > self.hot:
            raise ValueError(f"cold={self.cold!r} is above hot={self.hot!r}: the temperature falls from hot to cold")
        if self.scale == 1:
            raise ValueError("scale=1 is no guidance, there is nothing to search; use another scale")

    @property
    def weights(self) -> tuple[float, ...]:
        """The choices as CFG weights; the conditional one first, since the first wins where nothing else decides."""
        scales = self.scales or tuple(1 + (self.scale - 1) * factor for factor in (0.5, 1.0, 2.0))
        return 1.0, 0.0, *(float(w) for w in dict.fromkeys(scales) if w not in (0, 1))


@dataclass(frozen=True)
class Policy:
    """The result of a search.

    Attributes:
        weights: CFG weight of every step: 0 unconditional, 1 conditional.
        error: ``|x - x_cfg|^2 / |x_cond - x_cfg|^2`` over the samples of the search.
        nfe, nfe_full: network rows per sample, of the policy and of CFG in every step.
        search: how it was found.
        about: where it was found (model, fingerprint, seeds, classes, ...).
    """

    weights: tuple[float, ...]
    error: float
    nfe: float
    nfe_full: float
    search: Search
    about: dict[str, Any]

    @property
    def guidance(self) -> Guidance:
        """The policy as a guidance, whose ``repr`` is the expression to share."""
        return as_guidance(self.weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write expression, numbers and provenance as JSON, by way of a temporary file."""
        write_json(path, {"format": FORMAT, "guidance": repr(self.guidance), **asdict(self)})


def load_policy(path: str | os.PathLike[str], sampler: str | None = None, steps: int | None = None) -> Guidance:
    """The guidance of a file written by :meth:`Policy.save`.

    Args:
        path: of the file.
        sampler, steps: what it is to be used with: a policy belongs to those of its search. None is not compared.

    Raises:
        ValueError: the file is damaged or of another kind, or was searched with another sampler or number of steps.
    """
    content = read_json(path, FORMAT, "Policy.save", guidance=str, search=dict)
    search = content["search"]
    for name, given in (("sampler", sampler), ("steps", steps)):
        if given is not None and given != search.get(name):
            raise ValueError(
                f"{name}={given!r}: the policy in {str(path)!r} was searched with {name}={search.get(name)!r}; use that"
            )
    return parse(content["guidance"])


def as_guidance(weights: Sequence[float]) -> Guidance:
    """The guidance with these CFG weights, one per step: equal neighbours become one piece of a :class:`Piecewise`."""
    groups = [(w, len(list(same))) for w, same in itertools.groupby(weights)]
    pieces: list[Guidance] = [NoGuidance() if w == 1 else CFG(w) for w, _ in groups]
    bounds = list(itertools.accumulate(count for _, count in groups))[:-1]
    return Piecewise(tuple(pieces), tuple(bounds), unit="step") if bounds else pieces[0]


@dataclass(frozen=True, eq=False)
class _Relaxed(Guidance):
    """The mean over the choices of each step; the state is the expected number of rows so far."""

    probabilities: Tensor  # (steps, choices)
    weights: Tensor  # (choices,)

    def init(self, batch: int) -> Tensor:
        return self.weights.new_zeros(())

    def plan(self, info: StepInfo, state: Tensor) -> tuple[Branch, ...]:
        return COND, UNCOND

    def rule(self, info: StepInfo, predictions: Predictions, state: Tensor) -> tuple[Result, Tensor]:
        p = self.probabilities[info.index]
        rows = 2 - ((self.weights == 0) | (self.weights == 1)).to(p)  # either prediction alone is one
        mean = (p @ self.weights).to(predictions["cond"])
        return Result(torch.lerp(predictions["uncond"], predictions["cond"], mean)), state + p @ rows


class _Checkpointed:
    """A denoiser that keeps no activations: its backward pass evaluates it again."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.path = inner, inner.path

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, sigma, condition, use_reentrant=False, preserve_rng_state=False)
        return out


class _Runs:
    """Differentiable runs of one model over chosen samples."""

    def __init__(self, pipe: ClassPipeline, search: Search, labels: Tensor, seeds: list[int]) -> None:
        self.pipe, self.labels, self.seeds, self.solver = pipe, labels, seeds, find_sampler(search.sampler)
        name = search.grid or self.solver.grid
        if name not in noise.GRIDS:
            raise ValueError(f"grid={name!r} is unknown; use one of {', '.join(noise.GRIDS)}")
        self.sigmas = noise.GRIDS[name](search.steps, pipe.sigma_min, pipe.sigma_max)
        self.path = self.solver.path or pipe.models["main"].path

    def __call__(self, guidance: Guidance, index: Sequence[int]) -> tuple[Tensor, Guided]:
        """The images of some samples, and the finished run."""
        seeds, labels = [self.seeds[i] for i in index], self.labels[list(index)].to(self.pipe.device)
        conditions = {"cond": labels, "uncond": torch.full_like(labels, self.pipe.num_classes)}
        models = {"main": _Checkpointed(self.pipe.models["main"])}
        run = Guided(models, guidance, conditions, len(index), trace="none", seeds=seeds)
        like = torch.empty(len(index), *self.pipe.image_shape, device=self.pipe.device)
        x = start(Gaussian(seeds)(like), self.sigmas, self.path)
        return sample(run, x, self.sigmas, self.solver, self.path, Gaussian(seeds, stream=1)), run

    @torch.no_grad()
    def all(self, guidance: Guidance, batch: int) -> tuple[Tensor, float]:
        """The images of all samples, and their mean number of rows."""
        chunks = [range(len(self.seeds))[i : i + batch] for i in range(0, len(self.seeds), batch)]
        done = [self(guidance, chunk) for chunk in chunks]
        rows = [n for _, run in done for n in run.ledger.nfe]
        return torch.cat([images for images, _ in done]), sum(rows) / len(rows)


def search_policy(
    pipe: ClassPipeline, classes: Sequence[int], seeds: Sequence[int], search: Search, progress: bool = False
) -> Policy:
    """The policy that gradient descent finds.

    Args:
        pipe: a loaded pipeline; its networks are not changed.
        classes, seeds: the samples, one class index and one seed each; a few dozen.
        search: what to search, and how.
        progress: show a bar on stderr.

    Raises:
        ValueError: classes and seeds of different length, or unknown classes, sampler or grid.
    """
    labels = [pipe.class_index(c) for c in classes]
    if not labels or len(labels) != len(seeds):
        raise ValueError(f"classes has {len(labels)} entries and seeds {len(seeds)}: give one class and one seed per sample")
    runs = _Runs(pipe, search, torch.tensor(labels), check_seeds(seeds))
    target, full = runs.all(CFG(search.scale), search.batch)
    plain, _ = runs.all(NoGuidance(), search.batch)
    unit = max(_distance(plain, target), 1e-12)
    weights = torch.tensor(search.weights, dtype=torch.float64, device=pipe.device)
    logits = torch.zeros(search.steps, len(weights), dtype=torch.float64, device=pipe.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=search.lr)
    order = itertools.cycle(range(len(seeds)))
    for k in tqdm(range(search.iterations), disable=not progress, unit="iteration"):
        heat = search.hot * (search.cold / search.hot) ** (k / max(search.iterations - 1, 1))
        index = list(itertools.islice(order, min(search.batch, len(seeds))))
        images, run = runs(_Relaxed((logits / heat).softmax(1), weights), index)
        error = (images - target[index]).double().square().mean() / unit
        loss = error + search.cost * run.state / full
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = tuple(float(weights[c]) for c in logits.argmax(1))
    images, rows = runs.all(as_guidance(chosen), search.batch)
    about = {
        "model": pipe.name,
        "fingerprint": pipe.fingerprint,
        "seeds": runs.seeds,
        "classes": labels,
        "torch": torch.__version__,
    }
    return Policy(chosen, _distance(images, target) / unit, rows, full, search, about)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().square().mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="builtin/cifar10", help="built-in name or checkpoint file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16, help="classes are taken in turn")
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="seeds are this and the following ones")
    parser.add_argument("--scale", type=float, default=3.0, help="w of the CFG run that is the target")
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="CFG scales to choose from")
    parser.add_argument("--grid", help="noise levels; the sampler's own unless given")
    for name, value in asdict(Search(3.0)).items():
        if name not in ("scale", "scales", "grid"):
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    search = Search(**{name: getattr(args, name) for name in asdict(Search(3.0)) if name != "scales"}, scales=tuple(args.scales))
    pipe = load(args.model, device=args.device)
    classes = [i % pipe.num_classes for i in range(args.samples)]
    seeds = list(range(args.first_seed, args.first_seed + args.samples))
    policy = search_policy(pipe, classes, seeds, search, progress=sys.stderr.isatty())
    print(f"error {policy.error:.4f} of that without guidance, {policy.nfe:g} rows per sample instead of {policy.nfe_full:g}")
    print(policy.guidance)
    if args.out:
        policy.save(args.out)


if __name__ == "__main__":
    main()
