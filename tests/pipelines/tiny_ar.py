"""Tiny models as the recipes export them, under the names of the built-in files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VARConfig
from genkit.pipelines.exported import load_exported, save_exported
from genkit.tokenizers.compact import CompactConfig, CompactTokenizer
from genkit.training import cca, drafter, next_token
from genkit.training.tokens import TokenBatches, TokenData, encode
from genkit.weights import fingerprint

CODES = 32
NEXT_TOKEN = LlamaGenConfig(2, 2, 16, tokens=64, vocabulary=CODES, num_classes=10, multiple=8, dropout=0.0)
NEXT_SCALE = VARConfig(2, 16, 2, (1, 2, 4, 8), CODES, 4, 10, shared_adaln=True)
SHORT: dict[str, Any] = {"images": 16, "batch": 8, "warmup": 8, "lr": 1e-4}


def spread(network: Any, seed: int = 1) -> Any:
    """Weights that make conditions and earlier tokens matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(std=0.3, generator=g)
    return network.eval()


def data_of(path: Path, quantizer: str, seed: int = 0, size: int = CODES) -> TokenData:
    """Export a random tokenizer; sixteen images as its tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = CompactTokenizer(CompactConfig(quantizer, size, 4, 32, patch_nums=(1, 2, 4, 8)))
    save_exported(path, tokenizer)
    tokenizer = load_exported(path)[0]
    images = torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TokenData(encode(tokenizer, images), torch.arange(16) % 10, tokenizer, fingerprint(path))


def export(run: Any, path: Path, data: TokenData, extra: dict[str, Any] | None = None) -> None:
    """Train for two steps and export, as the recipes end."""
    args: Any = SimpleNamespace(export=path, hardware="a test")
    next_token.finish(run, TokenBatches(data, run.recipe), args, data, extra)


def export_all(folder: Path, work: Path) -> Path:
    """The files of all built-in autoregressive models, in ``folder``."""
    one = data_of(folder / "tokenizer.safetensors", "simvq")
    many = data_of(folder / "tokenizer_multiscale.safetensors", "multiscale")
    jobs: list[tuple[str, nn.Module, TokenData]] = [
        ("next_token", spread(LlamaGen(NEXT_TOKEN)), one),
        ("next_scale", spread(VAR(NEXT_SCALE)), many),
    ]
    for name, network, data in jobs:
        recipe = next_token.Recipe(**SHORT)
        export(next_token.trainer(network, data, recipe, work / name), folder / f"{name}.safetensors", data)
    target, source = load_exported(folder / "next_token.safetensors")[0], fingerprint(folder / "next_token.safetensors")
    head = spread(drafter.head_for(target), 2)
    head.embed_tokens.weight.data.copy_(target.tok_embeddings.weight)
    run = drafter.trainer(head, target, one, drafter.Recipe(**SHORT), work / "drafter", source)
    export(run, folder / "drafter.safetensors", one, {"target": source})
    run = cca.trainer(target, one, cca.Recipe(**SHORT), work / "cca", source)
    export(run, folder / "next_token_cca.safetensors", one, {"reference": source})
    return folder
