"""Fine-tune a model to need no guidance: ``python -m genkit.training.cca --model next_token.safetensors --data ...``.

Condition Contrastive Alignment (Chen et al. 2024): images with their own labels are made more likely than under the frozen
model one starts from, images with the labels of others less. For next-token and next-scale models; which one it is, the file
says.

How strong the guidance is that is learned, beta and lambda decide together: see :func:`matching_lambda`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.pipelines.exported import load_exported
from genkit.training.common import Trainer, add_options, fingerprint, from_options
from genkit.training.next_token import finish, token_options
from genkit.training.tokens import TeacherForcing, TokenBatches, TokenData, TokenSchedule, load_tokens, null_where


@dataclass(frozen=True)
class Recipe(TokenSchedule):
    """What a run does; written beside its weights."""

    images: int = 25_000
    batch: int = 64
    lr: float = 1e-4
    warmup: int = 3_000  # images
    decay: float = 0.5
    # Of the built-in model. The paper's 0.02, at a tenth of this rate, ask for far more than ten classes can tell apart.
    beta: float = 0.5
    lam: float = 10.0  # lambda


def cca_loss(gap: Tensor, gap_negative: Tensor, *, beta: float, lam: float, positive: Tensor | None = None) -> Tensor:
    """``-mean log sigma(beta r) - lambda mean log sigma(-beta r')``, ``r = log p_theta - log p_ref`` (Chen et al. 2024, eq. 12).

    With ``positive``, as in the official training with dropped labels: where it is True the second term of the row is
    ``-log sigma(beta r')``, without lambda, and the sum of both is divided by max(lambda, 1).

    Args:
        gap: r (B,) of images with their own labels, summed over the tokens.
        gap_negative: r' of images with labels of others.
        beta: above 0, in nats; the paper's is 0.02.
        lam: lambda, above 0; the paper's are 50 to 1000.
        positive: (B',) bool, rows of gap_negative that are no negatives: the label is dropped, or happens to be the image's own.

    Raises:
        ValueError: beta or lam is not positive.
    """
    if not (beta > 0 and lam > 0):
        raise ValueError(f"beta={beta}, lam={lam}: give positive numbers, such as 0.02 and 50")
    first = -F.logsigmoid(beta * gap).mean()
    if positive is None:
        return first - lam * F.logsigmoid(-beta * gap_negative).mean()
    sign, weight = torch.where(positive, 1.0, -1.0), torch.where(positive, 1.0, lam)
    second = -(weight * F.logsigmoid(sign * beta * gap_negative)).mean()
    return (first + second) / max(lam, 1.0)


def matching_lambda(log_ratio: Tensor, beta: float) -> Tensor:
    """``lambda = Z^beta``, ``Z = mean exp(log_ratio / beta)``: with it the optimum is the model guided with scale ``1 + 1/beta``.

    Without a bound on the network the optimum is ``log p_theta / p_ref = (log p(x|c) / p(x) - log lambda) / beta``. A model that
    sums to one can have that only where lambda makes it sum to one; lambda below gives weaker, above gives stronger guidance.

    Args:
        log_ratio: (n,) ``log p(x|c) - log p(x)`` in nats of draws x from p(x|c).
        beta: above 0; ``1 / (w - 1)`` for a guidance scale w.
    """
    return (beta * (torch.logsumexp(log_ratio / beta, 0) - math.log(len(log_ratio)))).exp()


def trainer(network: Any, data: TokenData, recipe: Recipe, out: Path, source: str = "") -> Trainer:
    """A new run that starts from ``network``, or the one found in ``out``. ``source`` names the network.

    The reference is in evaluation mode. (The official code leaves its dropout on.)
    """
    reference = copy.deepcopy(network).eval().requires_grad_(False)
    forced, classes = TeacherForcing(data.tokenizer.quantize), int(network.config.num_classes)

    def loss(net: nn.Module, tokens: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
        others = labels.roll(-1)
        both = torch.cat([null_where(dropped, y, classes) for y in (labels, others)])
        twice = tokens.repeat(2, 1)
        with torch.no_grad():
            base = forced.log_likelihood(reference, twice, both)
        gap, negative = (forced.log_likelihood(net, twice, both) - base).chunk(2)
        return cca_loss(gap, negative, beta=recipe.beta, lam=recipe.lam, positive=dropped | (others == labels))

    made_of = {"network": asdict(network.config), "reference": source, "tokenizer": data.fingerprint}
    run = Trainer(network.requires_grad_(True), recipe, out, loss, made_of)
    reference.to(run.device)
    data.tokenizer.to(run.device)
    return run


def main(argv: list[str] | None = None) -> None:
    parser = token_options(__doc__, "cifar10_cca")
    parser.add_argument("--model", type=Path, required=True, help="exported by genkit.training.next_token or next_scale")
    add_options(parser, Recipe())
    args = parser.parse_args(argv)
    network, about = load_exported(args.model, "genkit-next-token-1", "genkit-next-scale-1")
    recipe = from_options(Recipe, args)
    data = load_tokens(args.data, args.tokenizer, args.tokens, trained_on=about.get("tokenizer", ""))
    source = fingerprint(args.model)
    run = trainer(network, data, recipe, args.out, source)
    finish(run, TokenBatches(data, recipe), args, data, {"reference": source})


if __name__ == "__main__":
    main()
