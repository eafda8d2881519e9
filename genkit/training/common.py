"""What the recipes share: schedules, averaged weights, checkpoints, and a run that goes on where it was stopped."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from genkit.files import write_atomically, write_json
from genkit.weights import fingerprint as fingerprint

R = TypeVar("R")
#: Where built-in weights lie.
ASSETS = Path(__file__).resolve().parent.parent / "assets" / "cifar10"


@dataclass(frozen=True)
class Schedule:
    """How long a run is, how lr moves, how weights are averaged."""

    images: int = 1_500_000  # training images drawn in all
    batch: int = 128  # over all processes
    lr: float = 1e-3
    warmup: int = 20_000  # images
    decay: float = 0.35  # the last share of the run, over which lr falls linearly to zero
    ema_halflife: float = 0.05  # of the images seen so far
    seed: int = 0


def learning_rate(seen: int, r: Schedule) -> float:
    """Linear warm-up, constant, then linear to zero over the last ``decay`` share."""
    return r.lr * min(1.0, (seen + r.batch) / r.warmup, max(0.0, (1 - seen / r.images) / r.decay))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, seen: int, r: Schedule) -> None:
    """``e <- beta e + (1 - beta) p`` over parameters, with a half-life of ``ema_halflife seen`` images."""
    beta = 0.5 ** (r.batch / max(r.ema_halflife * seen, 1e-8))
    for e, p in zip(ema.parameters(), net.parameters(), strict=True):
        e.lerp_(p, 1 - beta)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix units make autocast worth it here (AMX or AVX512-BF16 on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, torch's generators are a function of the key; afterwards they are what they were."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))
        yield


class Epochs:
    """Indices of batch k, a function of (seed, k): every image once an epoch, in a new order; what is left over is skipped.

    Raises:
        ValueError: the batch is larger than the number of images.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if not 1 <= batch <= count:
            raise ValueError(f"batch={batch}: use 1 to {count}, the number of images")
        self.count, self.batch, self.seed = count, batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.count // self.batch)
        if epoch != self._epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=g)
        return self._order[place * self.batch : (place + 1) * self.batch]


def add_options(parser: argparse.ArgumentParser, defaults: Any) -> None:
    """An option for each field of a dataclass instance; tuples take several values."""
    for name, value in asdict(defaults).items():
        many = isinstance(value, tuple)
        kind = type(value[0]) if many else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, nargs="+" if many else None)


def from_options(kind: type[R], args: argparse.Namespace, **more: Any) -> R:
    """An instance of a dataclass from the options that have the names of its fields."""
    values = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()} | more)


def options(doc: str | None, out: str, assets: Path | None = None) -> argparse.ArgumentParser:
    """A parser with what every recipe has: ``--data``, ``--out``, ``--export``, ``--hardware``.

    Args:
        assets: for recipes that export into a folder: the one that is taken if none is named.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 JPEG pack (.npz)")
    parser.add_argument("--out", type=Path, default=Path("runs/train") / out, help="checkpoints; a run found here is resumed")
    if assets:
        exports = "afterwards write the weights into this folder (default: the package's own)"
        parser.add_argument("--export", type=Path, nargs="?", const=assets, help=exports)
    else:
        parser.add_argument("--export", type=Path, help="afterwards write the averaged weights into this .safetensors file")
    parser.add_argument("--hardware", default=platform.processor() or platform.machine(), help="one line for the exported file")
    return parser


def adamw(net: nn.Module, recipe: Schedule, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:
    """AdamW over the parameters that are not frozen; ``weight_decay`` of the recipe, if it has one, of matrices only."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": float(getattr(recipe, "weight_decay", 0.0))}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)


class Trainer:
    """One run: network, its average, optimizer, where they are kept. Step k is a function of the state before and of (seed, k).

    Args:
        net: called by ``loss`` only; it may hold buffers, which are kept too. Parameters that are frozen stay as they are.
        recipe: a :class:`Schedule`, or another dataclass with ``images``, ``batch`` and ``seed``.
        out: folder of ``checkpoint.pt``; one found there is gone on from.
        loss: of the network and a batch.
        made_of: plain values that a resumed run must agree in, such as the network's shape.
        optimizer: over parameters of ``net``; None is :func:`adamw`.
        rate: the learning rate, of the images seen and the recipe.
        average: called as ``average(ema, net, seen, recipe)`` after every step; None keeps no averaged weights.
        clip_norm, clip_value: of the gradient; None does not clip.
        after: called with the run after every step; what it gives is shown beside the loss.

    Raises:
        ValueError: the folder holds a run of something else.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Any,
        out: Path,
        loss: Callable[..., Tensor],
        made_of: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        rate: Callable[[int, Any], float] = learning_rate,
        average: Callable[[nn.Module, nn.Module, int, Any], None] | None = update_ema,
        clip_norm: float | None = 1.0,
        clip_value: float | None = None,
        after: Callable[[Trainer], dict[str, Any]] = lambda run: {},
    ) -> None:
        self.recipe, self.out, self.loss, self.made_of = recipe, out, loss, json.dumps(made_of)
        self.rate, self.average, self.after = rate, average, after
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.precision = "bf16" if has_bf16(Accelerator().device) else "no"
        self.accelerator = Accelerator(mixed_precision=self.precision)
        self.ema: Any = copy.deepcopy(net).eval().requires_grad_(False).to(self.device) if average else None
        self.net, self.optimizer = self.accelerator.prepare(net.train(), optimizer or adamw(net, recipe))
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []  # the recipes in force, each with the image count from which it was
        if (out / "checkpoint.pt").exists():
            self.load()

    @property
    def seen(self) -> int:
        """Images drawn so far."""
        seen: int = self.step * self.recipe.batch
        return seen

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def plain(self) -> Any:
        """The network itself, unwrapped."""
        return self.accelerator.unwrap_model(self.net)

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        of = state.get("made_of", self.made_of)  # the first checkpoints of diffusion models and classifiers do not say
        if of != self.made_of:
            raise ValueError(
                f"out={str(self.out)!r} holds a run of another network or recipe, {of}, not {self.made_of}; choose another folder"
            )
        self.plain().load_state_dict(state["net"])
        if self.average:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state.get("history", [])

    def save(self) -> None:
        if self.accelerator.is_main_process:
            state = {"net": self.plain().state_dict(), "optimizer": self.optimizer.state_dict(), "made_of": self.made_of}
            state |= {"step": self.step, "seconds": self.seconds, "history": self.history}
            state |= {"ema": self.ema.state_dict()} if self.average else {}
            write_atomically(self.out / "checkpoint.pt", partial(torch.save, state))

    def train_step(self, batches: Callable[..., tuple[Tensor, ...]]) -> float:
        a = self.accelerator
        batch = [t.to(a.device) for t in batches(self.step, a.process_index, a.num_processes)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.seen, self.recipe)
        with seeded(self.recipe.seed, self.step, a.process_index):
            loss = self.loss(self.net, *batch)
            a.backward(loss)
        if self.clip_norm is not None:
            a.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        if self.clip_value is not None:
            a.clip_grad_value_(self.net.parameters(), self.clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            self.average(self.ema, self.plain(), self.seen, self.recipe)
        return float(loss.detach())

    def run(self, batches: Callable[..., tuple[Tensor, ...]], save_every: float = 120.0) -> None:
        """To the end of the recipe, saving every so many seconds and at the end."""
        total, recipe = math.ceil(self.recipe.images / self.recipe.batch), asdict(self.recipe)
        if not self.history or self.history[-1]["recipe"] != recipe:
            self.history.append({"from_image": self.seen, "recipe": recipe})
        if self.accelerator.is_main_process:
            about = {"made_of": json.loads(self.made_of), "recipe": recipe, "precision": self.precision}
            write_json(self.out / "config.json", about)
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not self.accelerator.is_main_process, mininterval=5)
        average, last, saved = math.nan, time.perf_counter(), time.perf_counter()
        while self.step < total:
            loss = self.train_step(batches)
            average = loss if math.isnan(average) else 0.99 * average + 0.01 * loss
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", images=self.seen, refresh=False, **self.after(self))
            if now - saved > save_every:
                self.save()
                saved = now
        bar.close()
        self.save()

    def about(self, hardware: str) -> dict[str, Any]:
        """What the header of an exported file says of this run."""
        told = {"recipe": asdict(self.recipe), "history": self.history, "precision": self.precision, "images": self.seen}
        return told | {"seconds": round(self.seconds), "hardware": hardware}
