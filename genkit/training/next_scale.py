"""Train a next-scale model on CIFAR-10: ``python -m genkit.training.next_scale --tokenizer multiscale.safetensors --data ...``.

A VAR of a size of its own, with one AdaLN for all blocks, on the tokens of an exported multi-scale tokenizer: mean cross-entropy
over all positions, label dropout, horizontal flips, averaged weights (Tian et al. 2024, sec. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from genkit.models.var import VAR, VARConfig
from genkit.training.cifar10_data import CLASS_NAMES
from genkit.training.common import add_options, from_options, seeded
from genkit.training.next_token import finish, token_options, trainer
from genkit.training.tokens import TokenBatches, TokenSchedule, load_tokens


@dataclass(frozen=True)
class Recipe(TokenSchedule):
    """What a run does; written beside its weights."""

    images: int = 120_000
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 10_000  # images
    decay: float = 0.4
    weight_decay: float = 0.05


#: A size for 32 x 32 pixels; scales and codes are the tokenizer's.
CONFIG = VARConfig(5, width=192, heads=6, num_classes=10, shared_adaln=True)


def main(argv: list[str] | None = None) -> None:
    parser = token_options(__doc__, "cifar10_next_scale")
    parser.add_argument("--depth", type=int, default=CONFIG.depth)
    parser.add_argument("--width", type=int, default=CONFIG.width)
    parser.add_argument("--heads", type=int, default=CONFIG.heads)
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    recipe, data = from_options(Recipe, args), load_tokens(args.data, args.tokenizer, args.tokens, multiscale=True)
    q = data.tokenizer.quantize
    shape = {"patch_nums": q.patch_nums, "vocabulary": q.size, "code_dim": q.dim}
    config = from_options(VARConfig, args, num_classes=len(CLASS_NAMES), shared_adaln=CONFIG.shared_adaln, **shape)
    with seeded(recipe.seed):
        network = VAR(config)
    finish(trainer(network, data, recipe, args.out), TokenBatches(data, recipe), args, data)


if __name__ == "__main__":
    main()
