"""Train an image tokenizer on CIFAR-10: ``python -m genkit.training.tokenizer --quantizer simvq --data cifar10_jpeg.npz``.

``--quantizer`` is vq, simvq, lfq (8 x 8 tokens) or multiscale (VAR's residual quantizer). The loss is the squared error of the
pixels and the quantizer's own terms; horizontal flips; averaged weights. Where codes are parameters (vq, multiscale), one that
no latent has chosen for ``revive`` steps is put where a latent of the batch lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.pipelines.exported import load_exported, save_exported
from genkit.tokenizers.compact import QUANTIZERS, CompactConfig, CompactTokenizer
from genkit.tokenizers.quantizers import LFQ, SimVQ
from genkit.training.cifar10_data import load_split
from genkit.training.common import Epochs, Schedule, Trainer, adamw, add_options, from_options, options, seeded

FORMAT = "genkit-tokenizer-1"


@dataclass(frozen=True)
class Recipe(Schedule):
    """What a run does; written beside its weights."""

    images: int = 200_000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 5_000  # images
    decay: float = 0.5
    revive: int = 100  # steps without use after which a learned code is moved; 0 never moves any


class Batches:
    """Batch k, images in [-1, 1] with a random half of them flipped, as a function of (seed, k)."""

    def __init__(self, images: Tensor, recipe: Recipe) -> None:
        self.images, self.seed, self.indices = images, recipe.seed, Epochs(len(images), recipe.batch, recipe.seed)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor]:
        idx = self.indices(step)
        g = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + step)
        flip = torch.rand(len(idx), generator=g) < 0.5
        part = slice(rank * len(idx) // world, (rank + 1) * len(idx) // world)
        x = self.images[idx[part]].float() / 127.5 - 1
        return (torch.where(flip[part, None, None, None], x.flip(3), x),)


class Learner(nn.Module):
    """A tokenizer and what training it must remember: for how many steps each code has not been chosen."""

    idle: Tensor

    def __init__(self, tokenizer: CompactTokenizer, revive: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.revive = 0 if isinstance(tokenizer.quantize, SimVQ | LFQ) else revive
        self.register_buffer("idle", torch.zeros(tokenizer.quantize.size, dtype=torch.long))

    def forward(self, image: Tensor) -> Tensor:
        loss, _, indices, z = self.tokenizer(image)
        with torch.no_grad():
            self.idle += 1
            self.idle[indices.flatten()] = 0
            if self.revive:
                self._revive(z.detach())
        out: Tensor = loss
        return out

    def _revive(self, z: Tensor) -> None:
        dead = (self.idle >= self.revive).nonzero()[:, 0]
        rows = z.movedim(1, -1).flatten(0, -2)
        embedding: Any = self.tokenizer.quantize.get_submodule("embedding")
        # Not through .data: the graph of this step does not need the values of codes that no latent chose.
        embedding.weight.data[dead] = rows[torch.randint(len(rows), (len(dead),)).to(rows.device)].to(embedding.weight.dtype)
        if len(dead) and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(embedding.weight.data, 0)
        self.idle[dead] = 0


def trainer(config: CompactConfig, recipe: Recipe, out: Path) -> Trainer:
    """A new run, or the one found in ``out``."""
    with seeded(recipe.seed):
        net = Learner(CompactTokenizer(config), recipe.revive).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(net: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        return net(image.contiguous(memory_format=torch.channels_last))

    def in_use(run: Trainer) -> dict[str, Any]:
        return {"in_use": f"{float((run.plain().idle < 100).float().mean()):.0%}"}

    optimizer = adamw(net, recipe, betas=(0.9, 0.99))
    return Trainer(net, recipe, out, loss, asdict(config), optimizer=optimizer, after=in_use)


@torch.no_grad()
def quality(tokenizer: CompactTokenizer, images: Tensor, batch: int = 250) -> dict[str, float]:
    """PSNR in dB (peak: the range of pixels) of uint8 images (B, 3, H, H) after a round trip, and how the codes are used.

    ``usage`` is the share of the codebook that occurs, ``perplexity`` the exponential of the entropy of the codes' frequencies.
    """
    device, error = next(tokenizer.parameters()).device, 0.0
    counts = torch.zeros(tokenizer.quantize.size)
    for part in images.split(batch):
        x = part.to(device).float() / 127.5 - 1
        indices = tokenizer.encode(x)
        error += float((tokenizer.decode(indices).clamp(-1, 1) - x).square().mean()) * len(part) / len(images)
        counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
    p = counts / counts.sum()
    usage = float((counts > 0).float().mean())
    perplexity = math.exp(-float(torch.xlogy(p, p).sum()))
    return {"psnr": round(10 * math.log10(4 / error), 3), "usage": round(usage, 4), "perplexity": round(perplexity, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, "")
    parser.set_defaults(out=None)
    parser.add_argument("--quantizer", choices=list(QUANTIZERS), default="simvq")
    parser.add_argument("--size", type=int, help="codes in the codebook (default 1024; lfq: 2^dim)")
    parser.add_argument("--dim", type=int, help="values of a code (default 16; lfq: 10)")
    parser.add_argument("--channels", type=int, default=CompactConfig.channels)
    parser.add_argument("--blocks", type=int, default=CompactConfig.blocks)
    parser.add_argument("--patch-nums", type=int, nargs="+", default=CompactConfig.patch_nums)
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    args.dim = args.dim or (10 if args.quantizer == "lfq" else CompactConfig.dim)
    args.size = args.size or (2**args.dim if args.quantizer == "lfq" else CompactConfig.size)
    images, _ = load_split(args.data, "train")
    config = from_options(CompactConfig, args, image_size=images.shape[-1])
    run = trainer(config, from_options(Recipe, args), args.out or Path("runs/train") / f"cifar10_tokenizer_{args.quantizer}")
    run.run(Batches(images, run.recipe))
    if not run.accelerator.is_main_process:
        return
    averaged: Any = run.ema.tokenizer
    tokenizer, about = averaged, run.about(args.hardware)
    if args.export:
        save_exported(args.export, averaged, about)
        tokenizer, _ = load_exported(args.export, FORMAT)  # what is measured is what was written
    measured = quality(tokenizer, load_split(args.data, "test")[0][:2000])
    print(f"{args.quantizer}: {measured} on test images, after {run.seen} images, {run.seconds:.0f} s")
    if args.export:
        save_exported(args.export, averaged, about | {"test": measured})


if __name__ == "__main__":
    main()
