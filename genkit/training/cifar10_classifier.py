"""Train the built-in CIFAR-10 classifier: ``python -m genkit.training.cifar10_classifier --data cifar10_jpeg.npz --export``.

SGD with Nesterov momentum, learning-rate cycles, label smoothing, flips and small translations, averaged weights.
Every random choice is a function of (seed, step), so a resumed run continues exactly where the stopped one was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.models.classifier import Classifier, ClassifierConfig
from genkit.training.cifar10_classifier_export import accuracy, export
from genkit.training.cifar10_data import load_split
from genkit.training.common import ASSETS, Epochs, Trainer, add_options, from_options, options


@dataclass(frozen=True)
class Recipe:
    """What a run does; written beside its weights."""

    cycles: tuple[int, ...] = (450_000, 450_000)  # training images drawn in each learning-rate cycle: 9 epochs each
    batch: int = 128  # over all processes
    lr: float = 0.12  # highest learning rate
    warmup: float = 0.2  # share of a cycle over which lr rises linearly; it then falls linearly to zero
    momentum: float = 0.9
    weight_decay: float = 8e-4
    smoothing: float = 0.1  # of the labels
    shift: int = 2  # images move by up to this many pixels each way, edges reflected
    ema_halflife: int = 15_000  # images
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cycles", tuple(self.cycles))
        if not self.cycles or min(self.cycles) < 1:
            raise ValueError(f"cycles={self.cycles}: give one or more positive numbers of images")

    @property
    def cycle_steps(self) -> tuple[int, ...]:
        return tuple(-(-images // self.batch) for images in self.cycles)

    @property
    def steps(self) -> int:
        return sum(self.cycle_steps)

    @property
    def images(self) -> int:
        """Training images drawn in all."""
        return self.steps * self.batch


class Batches:
    """Batch k as a function of (seed, k) only: shuffled epochs, translations, flips.

    The first epoch flips a random half of the images, each later epoch the other half than the one before (Jordan 2024,
    arXiv:2404.00498, section 3.6).
    """

    def __init__(self, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self.labels, self.recipe = labels, recipe
        self.indices = Epochs(len(images), recipe.batch, recipe.seed)
        p = recipe.shift
        padded = [F.pad(part.float(), (p, p, p, p), mode="reflect").to(torch.uint8) for part in torch.split(images, 1000)]
        self.padded = torch.cat(padded).permute(0, 2, 3, 1).contiguous()
        self.size = images.shape[-1]
        self.flips = torch.rand(len(images), generator=torch.Generator().manual_seed(recipe.seed)) < 0.5

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Float images (B, C, H, W) in [-1, 1] and labels (B,): this process's share of batch ``step``."""
        r, idx, epoch = self.recipe, self.indices(step), step // (len(self.labels) // self.recipe.batch)
        g = torch.Generator().manual_seed((r.seed + 1) * 7_368_787 + step)
        top, left = torch.randint(0, 2 * r.shift + 1, (2, len(idx)), generator=g)
        here = torch.arange(self.size)
        columns = torch.where((self.flips[idx] ^ bool(epoch % 2))[:, None], here.flip(0), here) + left[:, None]
        rows = here + top[:, None]
        x = self.padded[idx[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 127.5 - 1
        part = slice(rank * len(idx) // world, (rank + 1) * len(idx) // world)
        return x[part], self.labels[idx[part]]


def learning_rate(step: int, r: Recipe) -> float:
    """One triangle a cycle: zero to ``lr`` over its first ``warmup`` share, then to zero at its end."""
    for length in r.cycle_steps:
        if step < length:
            peak = max(1.0, r.warmup * length)
            return r.lr * min((step + 1) / peak, (length - step) / max(1.0, length - peak))
        step -= length
    return 0.0


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, seen: int, r: Recipe) -> None:
    """``e <- beta e + (1 - beta) p`` over parameters and the running statistics of the norms."""
    # A short average at first: the initial weights are soon forgotten.
    beta = 0.5 ** (r.batch / min(r.ema_halflife, seen / 4))
    for e, p in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
        if e.is_floating_point():
            e.lerp_(p, 1 - beta)
        else:
            e.copy_(p)


def trainer(config: ClassifierConfig, recipe: Recipe, out: Path, whitening: Tensor) -> Trainer:
    """A new run, or the one found in ``out``. ``whitening``: images that the first layer is fitted to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = Classifier(config)
    net.fit_whitening(whitening)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x).float(), y, label_smoothing=recipe.smoothing)

    def rate(seen: int, r: Recipe) -> float:
        return learning_rate(seen // r.batch, r)

    made_of = {"network": asdict(config)}
    return Trainer(net, recipe, out, loss, made_of, optimizer=optimizer, rate=rate, average=update_ema, clip_norm=None)


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, "cifar10_classifier", ASSETS)
    parser.add_argument("--channels", type=int, nargs="+", default=list(ClassifierConfig().channels))
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe = from_options(Recipe, args)
    config = ClassifierConfig(channels=tuple(args.channels))
    images, labels = load_split(args.data, "train")
    run = trainer(config, recipe, args.out, images[:5000])
    run.run(Batches(images, labels, recipe))
    if not run.accelerator.is_main_process:
        return
    test = load_split(args.data, "test")
    plain, flipped = accuracy(run.ema, *test)
    print(f"test accuracy {plain:.2%} ({flipped:.2%} averaged over flips) after {run.step} steps, {run.seconds:.0f} s")
    if args.export:
        about = {"recipe": json.dumps(asdict(recipe)), "steps": str(run.step), "seconds": f"{run.seconds:.0f}"}
        export(run.ema, (images, labels), test, args.export, about | {"hardware": args.hardware})


if __name__ == "__main__":
    main()
