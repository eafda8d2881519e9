"""Train a next-token model on CIFAR-10: ``python -m genkit.training.next_token --tokenizer tokenizer.safetensors --data ...``.

A LlamaGen of a size of its own on the 8 x 8 tokens of an exported tokenizer: mean cross-entropy, label dropout, horizontal flips,
averaged weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.pipelines.exported import save_exported
from genkit.training.cifar10_data import CLASS_NAMES
from genkit.training.common import Trainer, add_options, from_options, options, seeded
from genkit.training.tokens import TeacherForcing, TokenBatches, TokenData, TokenSchedule, load_tokens, null_where


@dataclass(frozen=True)
class Recipe(TokenSchedule):
    """What a run does; written beside its weights."""

    images: int = 200_000
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 10_000  # images
    decay: float = 0.4
    weight_decay: float = 0.05


#: A size for 8 x 8 tokens of 1024 codes.
CONFIG = LlamaGenConfig(6, 6, 192, tokens=64, vocabulary=1024, num_classes=10, multiple=64, dropout=0.0)


def trainer(network: nn.Module, data: TokenData, recipe: TokenSchedule, out: Path) -> Trainer:
    """A new run of a next-token or a next-scale network, or the one found in ``out``."""
    config: Any = network.config
    forced, classes = TeacherForcing(data.tokenizer.quantize), int(config.num_classes)

    def loss(net: nn.Module, tokens: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
        logits = forced(net, tokens, null_where(dropped, labels, classes)).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    run = Trainer(network, recipe, out, loss, {"network": asdict(config), "tokenizer": data.fingerprint})
    data.tokenizer.to(run.device)
    return run


def finish(
    run: Trainer, batches: TokenBatches, args: argparse.Namespace, data: TokenData, extra: Mapping[str, Any] | None = None
) -> None:
    """Train to the end and export, with ``extra`` in the header."""
    run.run(batches)
    if args.export and run.accelerator.is_main_process:
        more = {"class_names": list(CLASS_NAMES), "tokenizer": data.fingerprint}
        save_exported(args.export, run.ema, run.about(args.hardware) | more | dict(extra or {}))


def token_options(doc: str | None, out: str) -> argparse.ArgumentParser:
    """:func:`options`, and those of recipes that train on tokens."""
    parser = options(doc, out)
    parser.add_argument("--tokenizer", type=Path, required=True, help="exported by genkit.training.tokenizer")
    parser.add_argument("--tokens", type=Path, default=Path("runs/train/tokens"), help="folder where encoded images are kept")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = token_options(__doc__, "cifar10_next_token")
    parser.add_argument("--layers", type=int, default=CONFIG.layers)
    parser.add_argument("--heads", type=int, default=CONFIG.heads)
    parser.add_argument("--width", type=int, default=CONFIG.width)
    parser.add_argument("--dropout", type=float, default=CONFIG.dropout)
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe, data = from_options(Recipe, args), load_tokens(args.data, args.tokenizer, args.tokens, multiscale=False)
    shape = {"tokens": data.tokenizer.length, "vocabulary": data.tokenizer.quantize.size}
    config = from_options(LlamaGenConfig, args, num_classes=len(CLASS_NAMES), multiple=CONFIG.multiple, **shape)
    with seeded(recipe.seed):
        network = LlamaGen(config)
    finish(trainer(network, data, recipe, args.out), TokenBatches(data, recipe), args, data)


if __name__ == "__main__":
    main()
