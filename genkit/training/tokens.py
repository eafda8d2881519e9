"""Images as tokens, for the recipes of autoregressive networks: kept in a file, drawn in batches, fed to networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from genkit.files import write_atomically
from genkit.models.autoregressive import Logits
from genkit.pipelines.exported import load_exported
from genkit.tokenizers.multiscale import MultiScale
from genkit.training.cifar10_data import load_split
from genkit.training.common import Epochs, Schedule, fingerprint


@dataclass(frozen=True)
class TokenSchedule(Schedule):
    """A :class:`Schedule` whose labels are dropped at times."""

    label_dropout: float = 0.1


class TokenData(NamedTuple):
    """A data set as tokens.

    Attributes:
        tokens: (2, N, L), of the images and of their mirror images. labels: (N,).
        tokenizer: that they are of, frozen, on the CPU. fingerprint: of its file.
    """

    tokens: Tensor
    labels: Tensor
    tokenizer: Any
    fingerprint: str


@torch.no_grad()
def encode(tokenizer: Any, images: Tensor, device: torch.device | str = "cpu", batch: int = 250) -> Tensor:
    """Tokens (2, N, L) of uint8 images (N, 3, H, H) and of their mirror images, in as few bytes as hold them."""
    kind, parts = torch.int16 if tokenizer.quantize.size < 2**15 else torch.int32, []
    for part in tqdm(images.split(batch), desc="tokens", leave=False):
        x = part.to(device).float() / 127.5 - 1
        parts.append(torch.stack([tokenizer.encode(v.contiguous()).flatten(1).to(kind).cpu() for v in (x, x.flip(3))]))
    return torch.cat(parts, 1)


def load_tokens(
    data: str | Path, tokenizer: str | Path, folder: Path, *, multiscale: bool | None = None, trained_on: str | None = None
) -> TokenData:
    """The training split as tokens of an exported tokenizer; from ``folder`` if they are there, else encoded and put there.

    Args:
        multiscale: which kind of tokenizer is needed. trained_on: its fingerprint. None: any will do.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one is damaged, or the tokenizer is not the one needed.
    """
    network, _ = load_exported(tokenizer, "genkit-tokenizer-1")
    of, pack, kind = fingerprint(tokenizer), Path(data), network.config.quantizer
    if multiscale is not None and isinstance(network.quantize, MultiScale) != multiscale:
        need = "'multiscale'" if multiscale else "one grid of tokens"
        raise ValueError(f"tokenizer={str(tokenizer)!r} has quantizer={kind!r}; this recipe needs {need}")
    if trained_on not in (None, of):
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} is {of}, but the model was trained on tokens of {trained_on!r}; give that"
        )
    size = pack.stat().st_size if pack.is_file() else 0
    kept = folder / f"tokens-{of}-{size}.pt"
    if kept.exists():
        state: Mapping[str, Tensor] = torch.load(kept, weights_only=True)
    else:
        images, labels = load_split(data, "train")
        device = Accelerator().device
        state = {"tokens": encode(network.to(device), images, device), "labels": labels}
        write_atomically(kept, partial(torch.save, state))
    return TokenData(state["tokens"], state["labels"], network.cpu(), of)


class TokenBatches:
    """Batch k as a function of (seed, k): tokens (b, L) of images or their mirror images, labels (b,), which of them to drop."""

    def __init__(self, data: TokenData, recipe: TokenSchedule) -> None:
        self.data, self.recipe = data, recipe
        self.indices = Epochs(len(data.labels), recipe.batch, recipe.seed)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        idx = self.indices(step)
        g = torch.Generator().manual_seed((self.recipe.seed + 1) * 7_368_787 + step)
        flip = (torch.rand(len(idx), generator=g) < 0.5).long()
        dropped = torch.rand(len(idx), generator=g) < self.recipe.label_dropout
        part = slice(rank * len(idx) // world, (rank + 1) * len(idx) // world)
        return self.data.tokens[flip[part], idx[part]].long(), self.data.labels[idx[part]], dropped[part]


class TeacherForcing:
    """All logits of given tokens in one pass: ``forced(network, tokens, labels)``.

    Args:
        quantizer: of the tokens; with a :class:`MultiScale`, networks are fed its ``next_inputs``, else the tokens themselves.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, network: Any, tokens: Tensor, labels: Tensor) -> Logits:
        """Logits (B, L, V) and features (B, L, d) for tokens (B, L)."""
        if isinstance(self.quantizer, MultiScale):
            first = self.quantizer.patch_nums[0] ** 2
            with torch.no_grad():
                inputs = F.pad(self.quantizer.next_inputs(tokens), (0, 0, first, 0))
        else:
            inputs = F.pad(tokens[:, :-1], (1, 0))  # position 0 is the condition's
        out: Logits = network(inputs, labels)
        return out

    def log_likelihood(self, network: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        """``log p(tokens | label)`` (B,), summed over the tokens."""
        logits = self(network, tokens, labels).logits
        return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").sum(1)


def null_where(dropped: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Labels, the null class in place of those dropped."""
    return torch.where(dropped, num_classes, labels)
