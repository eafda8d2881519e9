"""Train the built-in CIFAR-10 diffusion model: ``python -m genkit.training.cifar10_diffusion --data cifar10_jpeg.npz``.

EDM loss (Karras et al. 2022, table 1): ``ln sigma ~ N(-1.2, 1.2^2)``, weight ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``,
label dropout, horizontal flips, power-law EMA (half-life a fixed share of the images seen). Every random choice is a
function of (seed, step), so a resumed run continues exactly where the stopped one was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from genkit.denoiser import EDMDenoiser
from genkit.models.unet import UNet, UNetConfig
from genkit.pipelines.loading import load_checkpoint, save_checkpoint
from genkit.training.cifar10_data import CLASS_NAMES, load_split
from genkit.training.common import (
    Epochs,
    Schedule,
    add_options,
    from_options,
    has_bf16,
    learning_rate,
    save_atomically,
    update_ema,
)


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


class Trainer:
    """One run: network, EMA, optimizer, and where they are kept."""

    def __init__(self, config: UNetConfig, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        probe = Accelerator()
        self.precision = "bf16" if has_bf16(probe.device) else "no"
        self.accelerator = Accelerator(mixed_precision=self.precision)
        torch.manual_seed(recipe.seed)
        net = EDMDenoiser(UNet(config), recipe.sigma_data).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(self.accelerator.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []  # the recipes in force, each with the image count from which it was
        if (out / "checkpoint.pt").exists():
            self.load()

    def start_from(self, path: Path) -> None:
        """Go on from exported weights where no checkpoint is left: their image count carries over, the optimizer starts anew."""
        denoiser, about = load_checkpoint(path)
        self.plain().load_state_dict(denoiser.state_dict())
        self.ema.load_state_dict(denoiser.state_dict())
        self.step, self.seconds = int(about["images"]) // self.recipe.batch, float(about.get("seconds", 0.0))

    @property
    def seen(self) -> int:
        return self.step * self.recipe.batch

    def plain(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.net)
        return module

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.accelerator.device, weights_only=True)
        try:
            self.plain().load_state_dict(state["net"])
        except RuntimeError:
            raise ValueError(f"out={str(self.out)!r} holds a checkpoint of another network; choose another folder") from None
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state.get("history", [])

    def save(self) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, object] = {"net": self.plain().state_dict(), "ema": self.ema.state_dict(), "step": self.step}
            state |= {"optimizer": self.optimizer.state_dict(), "seconds": self.seconds, "history": self.history}
            save_atomically(state, self.out / "checkpoint.pt")

    def keep_weak(self) -> None:
        due = self.seen >= self.recipe.weak_at * self.recipe.images
        if due and self.accelerator.is_main_process and not (self.out / "weak.pt").exists():
            save_atomically({"ema": self.ema.state_dict(), "seen": self.seen}, self.out / "weak.pt")

    def train_step(self, batches: Batches) -> float:
        a, r = self.accelerator, self.recipe
        x, y, sigma, noise = (t.to(a.device) for t in batches(self.step, a.process_index, a.num_processes))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.seen, r)
        loss = edm_loss(self.net, x, y, sigma, noise, r.sigma_data)
        a.backward(loss)
        a.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        update_ema(self.ema, self.plain(), self.seen, r)
        return float(loss.detach())

    def run(self, batches: Batches, save_every: float = 120.0) -> None:
        total = math.ceil(self.recipe.images / self.recipe.batch)
        if not self.history or self.history[-1]["recipe"] != asdict(self.recipe):
            self.history.append({"from_image": self.seen, "recipe": asdict(self.recipe)})
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not self.accelerator.is_main_process, mininterval=5)
        average, last, saved = 0.0, time.perf_counter(), time.perf_counter()
        while self.step < total:
            average = self.train_step(batches) if average == 0 else 0.99 * average + 0.01 * self.train_step(batches)
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            self.keep_weak()
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", images=self.seen, refresh=False)
            if now - saved > save_every:
                self.save()
                saved = now
        self.save()


def export(trainer: Trainer, assets: Path, hardware: str) -> None:
    """Write the EMA weights, and the weak snapshot if it was kept, in half precision where ``genkit.load`` looks for them."""
    assets.mkdir(parents=True, exist_ok=True)
    about = {
        "recipe": asdict(trainer.recipe),
        "history": trainer.history,
        "precision": trainer.precision,
        "seconds": round(trainer.seconds),
        "hardware": hardware,
    }
    save_checkpoint(assets / "diffusion.safetensors", trainer.ema, CLASS_NAMES, {**about, "images": trainer.seen})
    if (trainer.out / "weak.pt").exists():
        state = torch.load(trainer.out / "weak.pt", map_location="cpu", weights_only=True)
        weak = copy.deepcopy(trainer.ema).cpu()
        weak.load_state_dict(state["ema"])
        save_checkpoint(assets / "diffusion_weak.safetensors", weak, CLASS_NAMES, {**about, "images": state["seen"]})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 JPEG pack (.npz)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/train/cifar10_diffusion"), help="checkpoints; a run found here is resumed"
    )
    parser.add_argument("--start-from", type=Path, help="exported weights to go on from, if --out holds no checkpoint")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--hardware", default=platform.processor() or platform.machine(), help="one line for the exported file")
    parser.add_argument(
        "--export", type=Path, help="afterwards write the weights into this folder, for example genkit/assets/cifar10"
    )
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe = from_options(Recipe, args)
    config = UNetConfig(channels=tuple(args.channels), blocks=args.blocks, attention=(len(args.channels) - 1,))
    images, labels = load_split(args.data, "train")
    trainer = Trainer(config, recipe, args.out)
    if args.start_from and trainer.step == 0:
        trainer.start_from(args.start_from)
    (args.out).mkdir(parents=True, exist_ok=True)
    record = {"network": asdict(config), "recipe": asdict(recipe), "precision": trainer.precision}
    (args.out / "config.json").write_text(json.dumps(record, indent=2))
    trainer.run(Batches(images, labels, recipe, config.num_classes))
    if args.export and trainer.accelerator.is_main_process:
        export(trainer, args.export, args.hardware)


if __name__ == "__main__":
    main()
