"""Train the built-in CIFAR-10 diffusion model: ``python -m genkit.training.cifar10_diffusion --data cifar10_jpeg.npz``.

EDM loss (Karras et al. 2022, table 1): ``ln sigma ~ N(-1.2, 1.2^2)``, weight ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``,
label dropout, horizontal flips, power-law EMA (half-life a fixed share of the images seen). Every random choice is a
function of (seed, step), so a resumed run continues exactly where the stopped one was.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoiser import EDMDenoiser
from genkit.files import write_atomically
from genkit.models.unet import UNet, UNetConfig
from genkit.pipelines.loading import load_checkpoint, save_checkpoint
from genkit.training.cifar10_data import CLASS_NAMES, load_split
from genkit.training.common import ASSETS, Epochs, Schedule, Trainer, add_options, from_options, options


@dataclass(frozen=True)
class Recipe(Schedule):
    """What a run does; written beside its weights."""

    label_dropout: float = 0.1
    weak_at: float = 0.125  # share of the run after which the weak snapshot is kept
    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2


class Batches:
    """Batch k as a function of (seed, k) only: shuffled epochs, flips, dropped labels, noise levels and noise."""

    def __init__(self, images: Tensor, labels: Tensor, recipe: Recipe, num_classes: int) -> None:
        self.images, self.labels, self.recipe, self.num_classes = images, labels, recipe, num_classes
        self.indices = Epochs(len(images), recipe.batch, recipe.seed)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r, idx = self.recipe, self.indices(step)
        g = torch.Generator().manual_seed((r.seed + 1) * 7_368_787 + step)
        x = self.images[idx].float() / 127.5 - 1
        flip = torch.rand(len(idx), generator=g) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        y = torch.where(torch.rand(len(idx), generator=g) < r.label_dropout, self.num_classes, self.labels[idx])
        sigma = (torch.randn(len(idx), generator=g) * r.p_std + r.p_mean).exp()
        noise = torch.randn(x.shape, generator=g)
        part = slice(rank * len(idx) // world, (rank + 1) * len(idx) // world)
        return x[part], y[part], sigma[part], noise[part]


def edm_loss(denoiser: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Mean over the batch of ``weight(sigma) |D(x + sigma n; sigma, y) - x|^2`` per pixel."""
    s = sigma[:, None, None, None]
    weight = (s.square() + sigma_data**2) / (s * sigma_data).square()
    loss: Tensor = (weight * (denoiser(x + s * noise, sigma, y).float() - x).square()).mean()
    return loss


def keep_weak(run: Trainer) -> dict[str, Any]:
    """Once its share of the run is done, keep the averaged weights of then."""
    due = run.seen >= run.recipe.weak_at * run.recipe.images
    if due and run.accelerator.is_main_process and not (run.out / "weak.pt").exists():
        write_atomically(run.out / "weak.pt", partial(torch.save, {"ema": run.ema.state_dict(), "seen": run.seen}))
    return {}


def trainer(config: UNetConfig, recipe: Recipe, out: Path) -> Trainer:
    """A new run, or the one found in ``out``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = EDMDenoiser(UNet(config), recipe.sigma_data).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    loss = partial(edm_loss, sigma_data=recipe.sigma_data)
    return Trainer(net, recipe, out, loss, {"network": asdict(config)}, optimizer=optimizer, after=keep_weak)


def start_from(run: Trainer, path: Path) -> None:
    """Go on from exported weights where no checkpoint is left: their image count carries over, the optimizer starts anew."""
    denoiser, about = load_checkpoint(path)
    run.plain().load_state_dict(denoiser.state_dict())
    run.ema.load_state_dict(denoiser.state_dict())
    run.step, run.seconds = int(about["images"]) // run.recipe.batch, float(about.get("seconds", 0.0))


def export(run: Trainer, assets: Path, hardware: str) -> None:
    """Write the EMA weights, and the weak snapshot if it was kept, in half precision where ``genkit.load`` looks for them."""
    about = run.about(hardware)
    save_checkpoint(assets / "diffusion.safetensors", run.ema, CLASS_NAMES, about)
    if (run.out / "weak.pt").exists():
        state = torch.load(run.out / "weak.pt", map_location="cpu", weights_only=True)
        weak = copy.deepcopy(run.ema).cpu()
        weak.load_state_dict(state["ema"])
        save_checkpoint(assets / "diffusion_weak.safetensors", weak, CLASS_NAMES, {**about, "images": state["seen"]})


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, "cifar10_diffusion", ASSETS)
    parser.add_argument("--start-from", type=Path, help="exported weights to go on from, if --out holds no checkpoint")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--blocks", type=int, default=1)
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe = from_options(Recipe, args)
    config = UNetConfig(channels=tuple(args.channels), blocks=args.blocks, attention=(len(args.channels) - 1,))
    images, labels = load_split(args.data, "train")
    run = trainer(config, recipe, args.out)
    if args.start_from and run.step == 0:
        start_from(run, args.start_from)
    run.run(Batches(images, labels, recipe, config.num_classes))
    if args.export and run.accelerator.is_main_process:
        export(run, args.export, args.hardware)


if __name__ == "__main__":
    main()
