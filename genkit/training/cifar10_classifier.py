"""Train the built-in CIFAR-10 classifier: ``python -m genkit.training.cifar10_classifier --data cifar10_jpeg.npz --export``.

SGD with Nesterov momentum, learning-rate cycles, label smoothing, flips and small translations, averaged weights.
Every random choice is a function of (seed, step), so a resumed run continues exactly where the stopped one was.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from genkit.models.classifier import Classifier, ClassifierConfig
from genkit.training.cifar10_classifier_export import accuracy, export
from genkit.training.cifar10_data import load_split
from genkit.training.common import add_options, from_options, has_bf16, save_atomically

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "cifar10"


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


class Batches:
    """Batch k as a function of (seed, k) only: shuffled epochs, translations, flips.

    The first epoch flips a random half of the images, each later epoch the other half than the one before (Jordan 2024,
    arXiv:2404.00498, section 3.6).
    """

    def __init__(self, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self.labels, self.recipe = labels, recipe
        self.count = len(images)
        if self.count < recipe.batch:
            raise ValueError(f"batch={recipe.batch} is more than the {self.count} images there are; use at most {self.count}")
        p = recipe.shift
        padded = [F.pad(part.float(), (p, p, p, p), mode="reflect").to(torch.uint8) for part in torch.split(images, 1000)]
        self.padded = torch.cat(padded).permute(0, 2, 3, 1).contiguous()
        self.size = images.shape[-1]
        self.flips = torch.rand(self.count, generator=torch.Generator().manual_seed(recipe.seed)) < 0.5
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> tuple[int, Tensor]:
        epoch, place = divmod(step, self.count // self.recipe.batch)
        if epoch != self._epoch:
            g = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=g)
        return epoch, self._order[place * self.recipe.batch : (place + 1) * self.recipe.batch]

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Float images (B, C, H, W) in [-1, 1] and labels (B,): this process's share of batch ``step``."""
        r, (epoch, idx) = self.recipe, self.indices(step)
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
def update_ema(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """``e <- beta e + (1 - beta) p`` over parameters and the running statistics of the norms."""
    for e, p in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
        if e.is_floating_point():
            e.lerp_(p, 1 - beta)
        else:
            e.copy_(p)


class Trainer:
    """One run: network, averaged network, optimizer, and where they are kept."""

    def __init__(self, config: ClassifierConfig, recipe: Recipe, out: Path, whitening: Tensor) -> None:
        self.recipe, self.out = recipe, out
        self.precision = "bf16" if has_bf16(Accelerator().device) else "no"
        self.accelerator = Accelerator(mixed_precision=self.precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            net = Classifier(config)
        net.fit_whitening(whitening)
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(self.accelerator.device)
        learned = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.step, self.seconds = 0, 0.0
        if (out / "checkpoint.pt").exists():
            self.load()

    def plain(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.net)
        return module

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.accelerator.device, weights_only=True)
        self.plain().load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, object] = {"net": self.plain().state_dict(), "ema": self.ema.state_dict(), "step": self.step}
            state |= {"optimizer": self.optimizer.state_dict(), "seconds": self.seconds}
            save_atomically(state, self.out / "checkpoint.pt")

    def train_step(self, batches: Batches) -> float:
        a, r = self.accelerator, self.recipe
        x, y = (t.to(a.device) for t in batches(self.step, a.process_index, a.num_processes))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, r)
        loss = F.cross_entropy(self.net(x).float(), y, label_smoothing=r.smoothing)
        a.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # A short average at first: the initial weights are soon forgotten.
        update_ema(self.ema, self.plain(), 0.5 ** (r.batch / min(r.ema_halflife, self.step * r.batch / 4)))
        return float(loss.detach())

    def run(self, batches: Batches, until: int | None = None, save_every: float = 60.0) -> None:
        """Train up to step ``until`` (default: the end), saving every ``save_every`` seconds and at the end."""
        total = self.recipe.steps if until is None else min(until, self.recipe.steps)
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not self.accelerator.is_main_process, mininterval=5)
        average, last, saved = 0.0, time.perf_counter(), time.perf_counter()
        self.net.train()
        while self.step < total:
            loss = self.train_step(batches)
            average = loss if average == 0 else 0.98 * average + 0.02 * loss
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            if now - saved > save_every:
                self.save()
                saved = now
        bar.close()
        self.save()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 JPEG pack (.npz)")
    parser.add_argument("--out", type=Path, default=Path("runs/train/cifar10_classifier"), help="checkpoints; resumes")
    exports = "write weights and reference statistics (default folder: the package's own)"
    parser.add_argument("--export", type=Path, nargs="?", const=ASSETS, help=exports)
    parser.add_argument("--hardware", default="", help="one line for the exported file: what the run was trained on")
    parser.add_argument("--channels", type=int, nargs="+", default=list(ClassifierConfig().channels))
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe = from_options(Recipe, args)
    config = ClassifierConfig(channels=tuple(args.channels))
    images, labels = load_split(args.data, "train")
    trainer = Trainer(config, recipe, args.out, images[:5000])
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"network": asdict(config), "recipe": asdict(recipe), "precision": trainer.precision}
    (args.out / "config.json").write_text(json.dumps(record, indent=2))
    trainer.run(Batches(images, labels, recipe))
    if not trainer.accelerator.is_main_process:
        return
    test = load_split(args.data, "test")
    plain, flipped = accuracy(trainer.ema, *test)
    print(f"test accuracy {plain:.2%} ({flipped:.2%} averaged over flips) after {trainer.step} steps, {trainer.seconds:.0f} s")
    if args.export:
        about = {"recipe": json.dumps(asdict(recipe)), "steps": str(trainer.step), "seconds": f"{trainer.seconds:.0f}"}
        about |= {"hardware": args.hardware}
        export(trainer.ema, (images, labels), test, args.export, about)


if __name__ == "__main__":
    main()
