"""What the recipes share: schedules, averaged weights, checkpoints, and a run that goes on where it was stopped."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from genkit.weights import read_safetensors

R = TypeVar("R")


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


def save_atomically(state: dict[str, object], path: Path) -> None:
    """``torch.save`` by way of a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """12 hexadecimal digits from the weights of a safetensors file, whatever its header says."""
    weights = read_safetensors(path)[0]
    data = b"".join(key.encode() + weights[key].contiguous().numpy().tobytes() for key in sorted(weights))
    return hashlib.sha256(data).hexdigest()[:12]


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


def options(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with what every recipe has: ``--data``, ``--out``, ``--export``, ``--hardware``."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 JPEG pack (.npz)")
    parser.add_argument("--out", type=Path, default=Path("runs/train") / out, help="checkpoints; a run found here is resumed")
    parser.add_argument("--export", type=Path, help="afterwards write the averaged weights into this .safetensors file")
    parser.add_argument("--hardware", default=platform.processor() or platform.machine(), help="one line for the exported file")
    return parser


class Trainer:
    """One run: network, its average, AdamW, and where they are kept. Step k is a function of the state before and of (seed, k).

    Args:
        net: called by ``loss`` only; it may hold buffers, which are kept too. Parameters that are frozen stay as they are.
        recipe: a :class:`Schedule`, with ``weight_decay`` (of matrices only) if there is to be any.
        out: folder of ``checkpoint.pt``; one found there is gone on from.
        loss: of the network and a batch.
        made_of: plain values that a resumed run must agree in, such as the network's shape.
        betas: of AdamW. clip_norm, clip_value: of the gradient; None does not clip.

    Raises:
        ValueError: the folder holds a run of something else.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Schedule,
        out: Path,
        loss: Callable[..., Tensor],
        made_of: dict[str, Any],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        clip_norm: float | None = 1.0,
        clip_value: float | None = None,
    ) -> None:
        self.recipe, self.out, self.loss = recipe, out, loss
        self.made_of, self.clip_norm, self.clip_value = json.dumps(made_of), clip_norm, clip_value
        self.precision = "bf16" if has_bf16(Accelerator().device) else "no"
        self.accelerator = Accelerator(mixed_precision=self.precision)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False).to(self.accelerator.device)
        trained = [p for p in net.parameters() if p.requires_grad]
        decay = float(getattr(recipe, "weight_decay", 0.0))
        groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": decay}]
        groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)
        self.net, self.optimizer = self.accelerator.prepare(net.train(), optimizer)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []  # the recipes in force, each with the image count from which it was
        if (out / "checkpoint.pt").exists():
            self.load()

    @property
    def seen(self) -> int:
        """Images drawn so far."""
        return self.step * self.recipe.batch

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def plain(self) -> Any:
        """The network itself, unwrapped."""
        return self.accelerator.unwrap_model(self.net)

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        if state["made_of"] != self.made_of:
            raise ValueError(
                f"out={str(self.out)!r} holds a run of another network, {state['made_of']}, not {self.made_of}; "
                "choose another folder"
            )
        self.plain().load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def save(self) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, object] = {"net": self.plain().state_dict(), "ema": self.ema.state_dict(), "step": self.step}
            state |= {"optimizer": self.optimizer.state_dict(), "seconds": self.seconds, "history": self.history}
            save_atomically(state | {"made_of": self.made_of}, self.out / "checkpoint.pt")

    def train_step(self, batches: Callable[..., tuple[Tensor, ...]]) -> float:
        a = self.accelerator
        batch = [t.to(a.device) for t in batches(self.step, a.process_index, a.num_processes)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.seen, self.recipe)
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
        update_ema(self.ema, self.plain(), self.seen, self.recipe)
        return float(loss.detach())

    def run(
        self, batches: Callable[..., tuple[Tensor, ...]], save_every: float = 120.0, note: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """To the end of the recipe. ``note`` gives further values to show."""
        total = math.ceil(self.recipe.images / self.recipe.batch)
        if not self.history or self.history[-1]["recipe"] != asdict(self.recipe):
            self.history.append({"from_image": self.seen, "recipe": asdict(self.recipe)})
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not self.accelerator.is_main_process, mininterval=5)
        average, last, saved = math.nan, time.perf_counter(), time.perf_counter()
        while self.step < total:
            loss = self.train_step(batches)
            average = loss if math.isnan(average) else 0.99 * average + 0.01 * loss
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", images=self.seen, refresh=False, **note())
            if now - saved > save_every:
                self.save()
                saved = now
        bar.close()
        self.save()

    def about(self, hardware: str) -> dict[str, Any]:
        """What the header of an exported file says of this run."""
        told = {"recipe": asdict(self.recipe), "history": self.history, "precision": self.precision, "images": self.seen}
        return told | {"seconds": round(self.seconds), "hardware": hardware}
