"""Train the built-in minority classifier: ``python -m genkit.training.minority --data cifar10_jpeg.npz --export``.

As Um et al. 2024 do it, in three stages. Every training image gets a minority score: how far from it the diffusion model lands
when it restores the image from noise. The scores become levels, quantile bins of equal size. A small classifier then learns
the level from noisy images, cross-entropy over noise levels ``ln sigma ~ N(p_mean, p_std^2)``.

What differs from the paper: the distance is taken in the features of the built-in CIFAR-10 classifier, not LPIPS, which needs
weights from elsewhere; there are 10 levels, not 100, because a network this small cannot tell percentiles apart and 500
images are few to learn one from; and it is trained from scratch, on no other network's features.

A killed run goes on where it was: scores are kept in blocks, training in checkpoints, and all randomness is a function of (seed,
image) and (seed, step).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from genkit.files import write_atomically
from genkit.guidance.minority import minority_levels, minority_score
from genkit.models.classifier import load_builtin
from genkit.models.minority import MinorityClassifier, MinorityConfig, feature_distance, save_minority
from genkit.pipelines.loading import load
from genkit.random import Keyed
from genkit.training.cifar10_data import load_split
from genkit.training.cifar10_diffusion import Batches
from genkit.training.cifar10_diffusion import Recipe as Drawing
from genkit.training.common import ASSETS, Trainer, add_options, from_options, options

STREAM = 11  # of each image's random numbers, for the noise it is restored from


@dataclass(frozen=True)
class Recipe:
    """What a run does; written beside its weights."""

    # The noise images are restored from. The paper's is 6.4 (t = 60 of 100); a picture with half as many pixels a side,
    # 32 against 64, is hidden as far by half the noise per pixel.
    sigma: float = 3.2
    draws: int = 5  # noises averaged over
    levels: int = 10
    images: int = 600_000  # training images drawn in all
    batch: int = 128  # over all processes
    lr: float = 1e-3
    warmup: int = 20_000  # images
    decay: float = 0.5  # the last share of the run, over which lr falls linearly to zero
    weight_decay: float = 0.05
    p_mean: float = -0.4
    p_std: float = 1.4
    held_out: float = 0.05  # share of the images kept back, to measure accuracy on
    seed: int = 0

    @property
    def drawing(self) -> Drawing:
        """How batches are drawn: as in the training of the diffusion model, without label dropout."""
        return Drawing(batch=self.batch, seed=self.seed, p_mean=self.p_mean, p_std=self.p_std, label_dropout=0.0)


class Scorer:
    """Minority scores of a data set, in blocks that are files: a block that is there is done."""

    def __init__(self, model: str, recipe: Recipe, out: Path, block: int = 500) -> None:
        self.recipe, self.block, self.accelerator = recipe, block, Accelerator()
        pipe, classifier = load(model, device=self.accelerator.device), load_builtin().to(self.accelerator.device)
        self.denoiser, self.distance = pipe.models["main"], feature_distance(classifier)
        weights = pipe.models["main"].state_dict().values()
        key = hashlib.sha256(b"".join(w.cpu().contiguous().numpy().tobytes() for w in weights))
        key.update(f"{classifier.fingerprint} {recipe.sigma} {recipe.draws} {recipe.seed} {block}".encode())
        self.folder = out / f"scores-{key.hexdigest()[:12]}"  # never those of other models or settings

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor, first: int) -> Tensor:
        """Scores (B,) of uint8 images (B, C, H, W), which are number ``first`` and following of the data set."""
        device = self.accelerator.device
        noise = Keyed(range(first, first + len(images)), STREAM)
        x = images.to(device).float() / 127.5 - 1
        r = self.recipe
        drawn = lambda like, draw: noise(like, r.seed, draw)  # noqa: E731
        return minority_score(self.denoiser, x, labels.to(device), r.sigma, drawn, r.draws, self.distance).float().cpu()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores (N,) of the whole data set; several processes share the work."""
        a, starts = self.accelerator, range(0, len(images), self.block)
        files = [self.folder / f"{start:06d}.pt" for start in starts]
        mine = list(zip(starts, files, strict=True))[a.process_index :: a.num_processes]
        for start, file in tqdm(mine, desc="score", unit="block", disable=not a.is_main_process, mininterval=5):
            if not file.exists():
                part = slice(start, start + self.block)
                scores = self.score(images[part], labels[part], start)
                write_atomically(file, partial(torch.save, {"scores": scores}))
        a.wait_for_everyone()
        return torch.cat([torch.load(file, weights_only=True)["scores"] for file in files])


def trainer(config: MinorityConfig, recipe: Recipe, out: Path, source: str = "") -> Trainer:
    """A new run, or the one found in ``out``. ``source`` names what the levels come from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = MinorityClassifier(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def loss(net: nn.Module, x: Tensor, level: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        found: Tensor = -net(x + sigma[:, None, None, None] * noise, sigma, level).mean()
        return found

    made_of = [asdict(config), asdict(recipe), source]
    return Trainer(net, recipe, out, loss, made_of, optimizer=optimizer, average=None, clip_norm=None)


def split(count: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Indices of the images trained on, and of those held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed))
    held = max(1, round(recipe.held_out * count))
    return order[held:].sort().values, order[:held].sort().values


@torch.no_grad()
def accuracy(net: MinorityClassifier, images: Tensor, levels: Tensor, sigma: float) -> dict[str, float]:
    """Over noisy images: the share given their level, and the share given one at most one level off."""
    g, device = torch.Generator().manual_seed(1), net.head.weight.device
    found = []
    for part in images.split(500):
        x = part.float() / 127.5 - 1
        x = x + sigma * torch.randn(x.shape, generator=g)
        found.append(net.logits(x.to(device), torch.full((len(x),), sigma, device=device)).argmax(1).cpu())
    off = (torch.cat(found) - levels).abs()
    shares = {"exact": float((off == 0).double().mean()), "within_one": float((off <= 1).double().mean())}
    return {name: round(value, 4) for name, value in shares.items()}


def export(run: Trainer, data: tuple[Tensor, Tensor], quantiles: Tensor, folder: Path, about: dict[str, Any]) -> Path:
    """Write ``minority.safetensors`` in half precision where ``genkit.load`` looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    net = run.plain().eval()
    measured = {f"{sigma:g}": accuracy(net, *data, sigma) for sigma in (0.1, 0.5, 2.0)}
    record: dict[str, Any] = {
        "recipe": asdict(run.recipe),
        "quantiles": [round(float(q), 5) for q in quantiles],
        "held_out": measured,
    }
    record |= {"distance": "features of the built-in CIFAR-10 classifier", "precision": run.precision}
    record |= {"seconds": round(run.seconds), **about}
    save_minority(folder / "minority.safetensors", net, {"about": json.dumps(record)})
    print(f"{folder / 'minority.safetensors'}: on held-out images, by noise level, {json.dumps(measured)}")
    return folder / "minority.safetensors"


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, "minority", ASSETS)
    parser.add_argument("--model", default="builtin/cifar10", help="diffusion model that restores: a built-in name or a file")
    parser.add_argument("--channels", type=int, nargs="+", default=list(MinorityConfig().channels))
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe = from_options(Recipe, args)
    images, labels = load_split(args.data, "train")
    scorer = Scorer(args.model, recipe, args.out)
    levels, quantiles = minority_levels(scorer(images, labels), recipe.levels)
    trained, held = split(len(images), recipe)
    config = MinorityConfig(levels=recipe.levels, channels=tuple(args.channels))
    run = trainer(config, recipe, args.out, scorer.folder.name)
    run.run(Batches(images[trained], levels[trained], recipe.drawing, recipe.levels))
    if args.export and run.accelerator.is_main_process:
        about = {"model": args.model, "hardware": args.hardware}
        export(run, (images[held], levels[held]), quantiles, args.export, about)


if __name__ == "__main__":
    main()
