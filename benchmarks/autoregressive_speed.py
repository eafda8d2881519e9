"""Autoregressive decoding beside the official code, also compiled: CPU seconds of a batch, CFG, float32, the same random weights.

    git clone https://github.com/FoundationVision/LlamaGen; git clone https://github.com/FoundationVision/VAR
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/autoregressive_speed.py --llamagen LlamaGen --var VAR \
        [--batch 1 4 8] [--compile] [--out docs/runs/autoregressive_speed.json]

LlamaGen-B at 256 and 384 pixels (cfg 4, top_k 2000) and VAR-d12 (cfg 1.5, top_k 900, top_p 0.96), without the image decoders.
Both sides race with the same exponential numbers, so that they must draw the same tokens. They run in turns in one process; a
figure is the sum over the steps of the least that a step took in any round, as the machine may be busy. Beside them stand the
bare matrix products of the blocks and the head, as the official code does them, and the time it takes to read the weights once
for each pass, which bounds what one thread can do with few rows. Exits with an error if tokens differ, if the cache is not of the
size that its formula says, or if a model is not ``--least`` times as fast (the figure of ``LEAST`` if it is not given).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, ClassVar
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.guidance import CFG
from genkit.models.compiled import compile_regions, eagerly
from genkit.models.llamagen import LLAMAGEN_SIZES, LlamaGen
from genkit.models.var import SCALES_256, VAR, VARConfig
from genkit.samplers.autoregressive import filters
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.samplers.autoregressive.next_scale import VAR_FILTERS, next_scale, var_guidance
from genkit.samplers.autoregressive.next_token import generate
from genkit.tokenizers.multiscale import MultiScaleVQ

#: How many times as fast genkit is to be, compiled.
LEAST = {"LlamaGen": 2.0, "VAR": 1.5}


def labels(batch: int) -> Tensor:
    return (torch.arange(batch) * 100 + 207) % 1000


@contextlib.contextmanager
def checkout(path: str) -> Iterator[None]:
    """Imports come from there; what its code imports and does not need for decoding has a stand-in."""
    stand_in: Any = types.ModuleType("huggingface_hub")
    stand_in.PyTorchModelHubMixin = type("PyTorchModelHubMixin", (), {"__init_subclass__": classmethod(lambda cls, **_: None)})
    before, here = set(sys.modules), os.path.dirname(os.path.abspath(__file__))
    others = [p for p in sys.path if os.path.abspath(p) != here]  # its packages have no __init__.py: a module here would go first
    sys.modules.setdefault("huggingface_hub", stand_in)
    with mock.patch.object(sys, "path", [path, *others]), contextlib.redirect_stdout(io.StringIO()):
        yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("huggingface_hub", "models", "dist", "utils", "autoregressive"):
            del sys.modules[name]


def randomize(network: nn.Module) -> None:
    """Weights that make a network answer differently to everything it is fed: the official ones begin near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim in (2, 3):
                value.normal_(std=0.03, generator=generator)


class Clock:
    """The least time of each step of a run, over several runs; a step begins when the module is called."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.marks: list[float] = []
        self.best: list[float] = []
        if module is not None:
            module.register_forward_pre_hook(lambda *_: self.mark())

    def mark(self) -> None:
        self.marks.append(time.process_time())

    def __enter__(self) -> None:
        self.marks.clear()
        self.mark()

    def __exit__(self, *_: object) -> None:
        self.mark()
        steps = [after - before for before, after in pairwise(self.marks)]
        self.best = [min(pair) for pair in zip(steps, self.best or steps, strict=True)]


class LlamaGenB:
    """Next token."""

    settings: ClassVar[dict[str, float]] = {"cfg": 4.0, "top_k": 2000}

    def __init__(self, path: str, batch: int, tokens: int = 256) -> None:
        self.passes, self.labels = [2 * batch] * tokens, labels(batch)
        with checkout(path):
            from autoregressive.models import generate as loop  # type: ignore[import-not-found]
            from autoregressive.models.gpt import GPT_B  # type: ignore[import-not-found]
        self.loop, self.network = loop, GPT_B(vocab_size=16384, block_size=tokens).eval()
        randomize(self.network)
        self.ours = LlamaGen(replace(LLAMAGEN_SIZES["B"], tokens=tokens)).eval().requires_grad_(False)
        self.ours.load_state_dict(self.network.state_dict())
        self.clocks = {"official": Clock(self.network), "genkit": Clock(self.ours)}

    def official(self) -> Tensor:
        torch.manual_seed(0)
        tokens: Tensor = self.loop.generate(self.network, self.labels, len(self.passes), cfg_scale=4.0, top_k=2000)
        return tokens.long()

    def run(self) -> tuple[Tensor, GuidedLogits]:
        batch = len(self.labels)
        run = GuidedLogits(self.ours, CFG(4.0), {"cond": self.labels, "uncond": self.ours.null(batch)}, batch)
        return generate(run, range(batch), Filters(top_k=2000)), run


class VARd12:
    """Next scale: 680 tokens in 10 scales, and the latent they make."""

    settings: ClassVar[dict[str, float]] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}

    def __init__(self, path: str, batch: int) -> None:
        self.passes, self.labels = [2 * batch * p * p for p in SCALES_256], labels(batch)
        with checkout(path):
            from models.var import VAR as Official  # type: ignore[import-not-found]
            from models.vqvae import VQVAE  # type: ignore[import-not-found]

            tokenizer = VQVAE(vocab_size=4096, z_channels=32, ch=32, v_patch_nums=SCALES_256).eval()
            self.network = Official(tokenizer, depth=12, embed_dim=768, num_heads=12, attn_l2_norm=True).eval()
        randomize(self.network)
        randomize(tokenizer.quantize)
        tokenizer.fhat_to_img = lambda f_hat: f_hat  # the decoder is not what is measured
        self.tokens: list[Tensor] = []
        tokenizer.quantize.embedding.register_forward_hook(lambda _, fed, out: self.tokens.append(fed[0]))
        self.ours = VAR(VARConfig(12)).eval().requires_grad_(False)
        self.ours.load_state_dict(self.network.state_dict())
        self.clocks = {"official": Clock(self.network.blocks[0]), "genkit": Clock(self.ours)}
        self.quantizer = MultiScaleVQ().eval().requires_grad_(False)
        self.quantizer.load_state_dict(tokenizer.quantize.state_dict())

    def official(self) -> Tensor:
        self.tokens.clear()
        self.network.autoregressive_infer_cfg(len(self.labels), self.labels, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)
        return torch.cat(self.tokens, 1)

    def run(self) -> tuple[Tensor, GuidedLogits]:
        batch = len(self.labels)
        run = GuidedLogits(self.ours, var_guidance(1.5), {"cond": self.labels, "uncond": self.ours.null(batch)}, batch)
        return next_scale(run, self.quantizer, range(batch), VAR_FILTERS).indices, run


def genkit_run(case: Any) -> tuple[Tensor, GuidedLogits]:
    """With the official code's numbers: one stream for the whole run, in place of one for each sample and step."""
    stream = torch.Generator().manual_seed(0)

    def race(self: Any, probabilities: Tensor, *key: int) -> Tensor:
        return (probabilities / torch.empty(probabilities.shape).exponential_(generator=stream)).argmax(-1)

    with mock.patch.object(filters.Race, "__call__", race):
        tokens, run = case.run()
    return tokens, run


def products(network: Any) -> list[nn.Linear]:
    """The layers of the blocks and the head that every pass needs."""
    return [m for n, m in network.named_modules() if isinstance(m, nn.Linear) and not n.startswith("word") and "ada" not in n]


@torch.no_grad()
def matmuls(network: Any, passes: list[int], clock: Clock) -> None:
    """The blocks' and the head's matrix products alone, for passes of so many rows."""
    layers = products(network)
    for rows in passes:
        clock.mark()
        for layer in layers:
            F.linear(torch.ones(rows, layer.in_features), layer.weight)


def reading(network: Any, rounds: int = 5) -> float:
    """Seconds to read the weights of the matrix products once, the least of some rounds."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        for layer in products(network):
            layer.weight.sum()
        found.append(time.process_time() - begin)
    return min(found)


def cache_bytes(run: GuidedLogits) -> tuple[int, int]:
    """What the caches of a run take, and ``2 layers rows heads length head_dim`` numbers of 4 bytes, two rows of CFG a sample."""
    layers, heads, head_dim = run.model("main").cache_shape
    taken = sum(lane.cache.store.nbytes for lane in run._lanes.values())
    return taken, 2 * layers * 2 * run.batch * heads * run.room * head_dim * 4


def measure(case: Any, rounds: int, compiled: bool) -> dict[str, Any]:
    fast, clocks = Clock(), {**case.clocks, "matmuls": Clock()}
    for i in range(rounds):
        with clocks["official"]:
            wanted = case.official()
        with clocks["genkit"], eagerly():
            found, run = genkit_run(case)
        with clocks["matmuls"]:
            matmuls(case.ours, case.passes, clocks["matmuls"])
        if compiled:
            compile_regions(case.ours)
            if i == 0:
                genkit_run(case)  # where everything is compiled
            handle = case.ours.register_forward_pre_hook(lambda *_: fast.mark())
            with fast:
                again, run = genkit_run(case)
            handle.remove()
            clocks["compiled"] = fast
            found = torch.where(found == again, found, -1)
        seconds = {name: sum(clock.best) for name, clock in clocks.items()}
        print(f"round {i + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True)
    taken, formula = cache_bytes(run)
    equal = {"tokens": found.numel(), "equal_tokens": int((wanted == found).sum())}
    memory = {"cache_bytes": taken, "cache_formula": formula}
    bound, numbers = reading(case.ours) * len(case.passes), sum(layer.weight.numel() for layer in products(case.ours))
    work = {"passes": len(case.passes), "weight_bytes": 4 * numbers, "flop": 2 * numbers * sum(case.passes)}
    best = seconds.get("compiled", seconds["genkit"])
    ratios = {"ratio": seconds["official"] / best, "eager_ratio": seconds["official"] / seconds["genkit"]}
    return {"seconds": seconds, "reading_weights": bound, **work, **ratios, **equal, **memory, "settings": case.settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llamagen", default="", help="a checkout of FoundationVision/LlamaGen")
    parser.add_argument("--var", default="", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", default="")
    parser.add_argument("--least", type=float, default=None, help="fail if genkit is not so many times as fast")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true", help="also compiled; the first round then takes minutes")
    parser.add_argument("--only", default="", help="models whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, tuple[Callable[[str, int], Any], str]] = {
        "LlamaGen-B, 256 tokens": (LlamaGenB, args.llamagen),
        "LlamaGen-B, 576 tokens": (lambda path, batch: LlamaGenB(path, batch, 576), args.llamagen),
        "VAR-d12, 680 tokens": (VARd12, args.var),
    }
    found, failed = {}, []
    for (name, (kind, path)), batch in product(cases.items(), args.batch):
        if not path or args.only not in name:
            continue
        name = f"{name}, batch {batch}"
        found[name] = r = measure(kind(path, batch), args.rounds, args.compile)
        least = args.least or (LEAST[name.split("-")[0]] if args.compile else 1.0)
        print(f"{name}: {r['ratio']:.2f} times as fast, {r['equal_tokens']} of {r['tokens']} tokens equal", flush=True)
        failed += [f"{name}: {r['ratio']:.2f} times as fast, not {least}"] if r["ratio"] < least else []
        failed += [f"{name}: tokens differ"] if r["equal_tokens"] < r["tokens"] else []
        failed += [f"{name}: the cache is not its formula"] if r["cache_bytes"] != r["cache_formula"] else []
    if args.out:
        save(args.out, {"models": found, "rounds": args.rounds})
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
