"""Train a drafter for a next-token model: ``python -m genkit.training.drafter --model next_token.safetensors --data ...``.

An EAGLE head learns the features that the target will have one position later, from those it has now and the token it is fed
next: ``SmoothL1(f', f) + p_weight CE(p, p')``, p the target's distribution and p' that of the predicted features through the
target's own output layer. Uniform noise on the features it is given stands for its own errors at sampling; gradients are
clipped by value (Li et al. 2024; LANTERN's settings).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.models.eagle import EagleConfig, EagleHead
from genkit.models.llamagen import LlamaGen
from genkit.pipelines.exported import load_exported
from genkit.training.common import Trainer, add_options, fingerprint, from_options, seeded
from genkit.training.next_token import finish, token_options
from genkit.training.tokens import TeacherForcing, TokenBatches, TokenData, TokenSchedule, load_tokens, null_where


@dataclass(frozen=True)
class Recipe(TokenSchedule):
    """What a run does; written beside its weights."""

    images: int = 60_000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 5_000  # images
    decay: float = 0.5
    noise: float = 0.1  # half-width of the uniform noise on features
    p_weight: float = 0.1  # of the cross-entropy


def drafter_loss(predicted: Tensor, features: Tensor, output: nn.Module, p_weight: float = 0.1) -> Tensor:
    """``SmoothL1(f', f) + p_weight CE(softmax(output(f)), softmax(output(f')))``, means over positions (Li et al. 2024, eq. 5).

    Args:
        predicted: f' (B, n, d). features: f (B, n, d), the target's.
        output: the target's last layer.
    """
    regression = F.smooth_l1_loss(predicted, features)
    with torch.no_grad():
        p = output(features).float().softmax(-1)
    agreement = F.cross_entropy(output(predicted).float().flatten(0, 1), p.flatten(0, 1))
    return regression + p_weight * agreement


def head_for(target: LlamaGen, hidden: int | None = None) -> EagleHead:
    """A new head for a target that is conditioned on classes, with a copy of its token embeddings.

    Args:
        hidden: width of the feed-forward layer, default 8/3 of the target's.
    """
    c = target.config
    hidden = hidden or -(-8 * c.width // 3 // c.multiple) * c.multiple
    head = EagleHead(EagleConfig(c.width, c.heads, c.vocabulary, hidden, c.tokens, target.prefix))
    head.embed_tokens.weight.data.copy_(target.tok_embeddings.weight)
    return head


def trainer(head: EagleHead, target: LlamaGen, data: TokenData, recipe: Recipe, out: Path, source: str = "") -> Trainer:
    """A new run, or the one found in ``out``. ``source`` names the target."""
    forced, classes = TeacherForcing(data.tokenizer.quantize), target.config.num_classes

    def loss(net: nn.Module, tokens: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
        with torch.no_grad():
            features = forced(target, tokens, null_where(dropped, labels, classes)).hidden.float()
            given = features[:, :-1] + (2 * torch.rand_like(features[:, :-1]) - 1) * recipe.noise
        return drafter_loss(net(given, tokens[:, :-1]).float(), features[:, 1:], target.output, recipe.p_weight)

    made_of = {"network": asdict(head.config), "target": source}
    run = Trainer(head, recipe, out, loss, made_of, clip_norm=None, clip_value=0.5)
    target.to(run.device)
    return run


def main(argv: list[str] | None = None) -> None:
    parser = token_options(__doc__, "cifar10_drafter")
    parser.add_argument("--model", type=Path, required=True, help="the target, exported by genkit.training.next_token")
    parser.add_argument("--hidden", type=int, help="width of the feed-forward layer (default 8/3 of the target's)")
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    target, about = load_exported(args.model, "genkit-next-token-1")
    recipe, trained_on = from_options(Recipe, args), about.get("tokenizer", "")
    data = load_tokens(args.data, args.tokenizer, args.tokens, multiscale=False, trained_on=trained_on)
    with seeded(recipe.seed):
        head = head_for(target, args.hidden)
    source = fingerprint(args.model)
    finish(trainer(head, target, data, recipe, args.out, source), TokenBatches(data, recipe), args, data, {"target": source})


if __name__ == "__main__":
    main()
