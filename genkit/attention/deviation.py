"""How far every backend and kernel of attention is from float64, and whether that is what its dtype allows.

    python -m genkit.attention.deviation [--out DIR] [--quick] [--backends sdpa ...] [--device cuda] [--no-trajectories]

prints a table, and writes it with a plot and a JSON file into DIR. After Golden et al. 2024, "Is Flash Attention Stable?"
(arXiv 2405.02803), which finds deviations of FlashAttention in bfloat16 about ten times those of the plain way; what stands in
the table is what is found here.

Each measurement has its own reference: the result in float64 from the same inputs, rounded to the dtype before. So it is the
arithmetic that is measured. What the rounding of inputs and output does by itself is the *band*; :data:`BOUNDS` says for each
backend and dtype how many bands it may deviate, and :func:`within` checks it. That bounds one pass, and says nothing about
training.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.attention.base import BACKENDS, Unavailable
from genkit.attention.call import attention
from genkit.attention.choice import check, reason
from genkit.attention.rounding import tiled_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Deviation:
    """Of a result from another one: largest and root mean square difference, mean difference, and the Wasserstein-1 distance.

    The last is that between the distributions of entries, ``mean |sort(a) - sort(b)|``.
    """

    largest: float
    rms: float
    bias: float
    wasserstein: float


def deviation(result: Tensor, exact: Tensor) -> Deviation:
    """Of two tensors of one shape, computed in float64."""
    a, b = result.double().flatten(), exact.double().flatten()
    error = a - b
    distance = (a.sort().values - b.sort().values).abs().mean()
    return Deviation(*(float(x) for x in (error.abs().max(), error.square().mean().sqrt(), error.mean(), distance)))


@dataclass(frozen=True)
class Shape:
    """Normal queries, keys and values: ``keys`` of them, the last ``queries`` ask.

    Args:
        keys, head_size: Tk and D.
        gain: the standard deviation of the scores; 1 is a flat softmax, 4 a peaked one.
        heads: H.
        queries: Tq, at most this many.
    """

    keys: int
    head_size: int
    gain: float = 1.0
    heads: int = 2
    queries: int = 256

    def draw(self, seeds: Sequence[int] = (0, 1)) -> dict[str, Tensor]:
        """q, k, v in float64, (seeds, H, T, D)."""
        rows = []
        for seed in seeds:
            source = torch.Generator().manual_seed(seed)
            sizes = (min(self.queries, self.keys), self.keys, self.keys)
            rows.append([torch.randn(self.heads, n, self.head_size, generator=source, dtype=torch.float64) for n in sizes])
        q, k, v = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return {"q": self.gain * q, "k": k, "v": v}


SHAPES = (
    Shape(256, 72),  # DiT-XL
    Shape(680, 64),  # VAR
    *(Shape(1024, size) for size in (32, 64, 128)),
    Shape(1024, 64, gain=4.0),
    Shape(4096, 64),
    Shape(4096, 64, gain=4.0),
    Shape(513, 64, queries=1),  # decoding with a cache
)
QUICK = (Shape(256, 72), Shape(1024, 64, gain=4.0), Shape(513, 64, queries=1))


@dataclass(frozen=True)
class Bound:
    """How much is allowed: ``rms`` and ``largest`` in bands, and ``extra``, in units of the output, for what is approximate."""

    rms: float
    largest: float
    extra: float = 0.0


def _both(fp32: Bound, half: Bound) -> dict[torch.dtype, Bound]:
    return {torch.float32: fp32, torch.bfloat16: half, torch.float16: half}


_EXACT = _both(Bound(16, 24), Bound(1, 1))
#: What each backend and kernel may deviate, by dtype; ``sdpa:math`` falls under ``sdpa``, what is not named under ``other``.
#: Sums of float32 numbers are kept in float32, hence the many bands; those of half precision must be kept in float32 too.
BOUNDS: dict[str, dict[torch.dtype, Bound]] = {
    "reference": _both(Bound(1, 1), Bound(1, 1)),
    "sdpa": _EXACT,
    "flex": _EXACT,
    "xformers": _EXACT,
    "flash": _EXACT,
    "sage": _both(Bound(16, 24), Bound(10, 20)),  # products of 8-bit integers
    "low_rank": _both(Bound(16, 24, extra=1e-2), Bound(1, 1, extra=1e-2)),  # its default tolerance
    "kernel": _both(Bound(4, 6), Bound(1, 1.5)),
    "other": _both(Bound(32, 48), Bound(1.5, 2)),
}


def bound_of(name: str, dtype: torch.dtype) -> Bound:
    """The entry of :data:`BOUNDS` for a backend or kernel."""
    family = next((n for n in (name, name.partition(":")[0]) if n in BOUNDS), "other")
    return BOUNDS[family][dtype]


def within(found: Deviation, band: Deviation, bound: Bound) -> str | None:
    """Why a deviation is more than the bound allows; None if it is not.

    Args:
        found: of the kernel under test.
        band: what is normal, such as the deviation that rounding alone makes.
    """
    if not math.isfinite(found.largest):
        return "the result is not finite"
    for name, limit in (("rms", bound.rms * band.rms), ("largest", bound.largest * band.largest)):
        value = getattr(found, name)
        if value > limit + bound.extra:
            return f"{name} deviation {value:.3g} exceeds {limit + bound.extra:.3g} ({getattr(bound, name):g} x the band)"
    return None


Inputs = Mapping[str, Tensor]
Run = Callable[..., Tensor]


def band_of(formula: Run, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Deviation]:
    """The formula in float64 of the rounded inputs, and what rounding inputs and output does to it: the sum of both."""
    rounded = formula(**{name: x.to(dtype).double() for name, x in inputs.items()})
    before, after = deviation(rounded, formula(**inputs)), deviation(rounded.to(dtype), rounded)
    return rounded, Deviation(*(getattr(before, n) + getattr(after, n) for n in ("largest", "rms", "bias", "wasserstein")))


def row(kind: str, name: str, dtype: torch.dtype, about: Mapping[str, Any], found: Deviation, band: Deviation) -> dict[str, Any]:
    """One line of the table: ``kind`` is "backend", "kernel" or "reference", which no bound holds for."""
    line = {"kind": kind, "name": name, "dtype": str(dtype).removeprefix("torch."), **about, **asdict(found)}
    line |= {"band_rms": band.rms, "band_largest": band.largest}
    if kind != "reference":
        bound = bound_of("kernel" if kind == "kernel" else name, dtype)
        line |= {"bound": asdict(bound), "exceeds": within(found, band, bound)}
    return line


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` in the dtype of its arguments, operation by operation."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def attention_deviation(
    backends: Sequence[str] | None = None,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    *,
    device: str | torch.device = "cpu",
    seeds: Sequence[int] = (0, 1),
) -> list[dict[str, Any]]:
    """Deviations of backends of attention from float64.

    Args:
        backends: names; None is all that can be used here. One that cannot do a call has no line for it.
        shapes, dtypes: what to measure them at.
        device: where; references are computed on the CPU.
        seeds: of the inputs, each one row of the batch.

    Returns:
        For each shape and dtype the lines of :func:`row`: three references, named ``inputs rounded`` (float64 of the rounded
        inputs against float64 of the others), ``output rounded`` and ``naive`` (every operation in the dtype); then the backends.

    Raises:
        Unavailable: a backend that was named cannot be used here.
    """
    for name in backends or ():
        check(name, f"backend {name!r}")
    names = [n for n in BACKENDS if reason(n) is None] if backends is None else backends
    lines = []
    for shape in shapes:
        inputs = shape.draw(seeds)
        exact = exact_attention(**inputs)
        for dtype in dtypes:
            low = {name: x.to(dtype).to(device) for name, x in inputs.items()}
            rounded, band = band_of(exact_attention, inputs, dtype)
            references = {
                "inputs rounded": (rounded, exact),
                "output rounded": (rounded.to(dtype), rounded),
                "naive": (exact_attention(**low).cpu(), rounded),
            }
            for name, pair in references.items():
                lines.append(row("reference", name, dtype, asdict(shape), deviation(*pair), band))
            for name in names:
                out = _try(low, name, must=backends is not None)
                if out is not None:
                    lines.append(row("backend", name, dtype, asdict(shape), deviation(out.cpu(), rounded), band))
    return lines


def _try(inputs: Inputs, name: str, must: bool) -> Tensor | None:
    """The result of a backend; None if it cannot do this call. That it fails matters only if it was asked for."""
    try:
        with torch.no_grad():
            return attention(inputs["q"], inputs["k"], inputs["v"], backend=name)
    except Unavailable:
        return None
    except Exception:
        if must:
            raise
        return None


def kernel_deviation(
    dtypes: Sequence[torch.dtype] = DTYPES, *, device: str | torch.device = "cpu", seed: int = 0
) -> list[dict[str, Any]]:
    """Deviations of the kernels of :mod:`genkit.attention.kernels` from their formulas in float64; lines of :func:`row`."""
    from genkit.attention.deviation_kernels import KERNELS

    lines = []
    for name, kernel in KERNELS.items():
        inputs = kernel.draw(torch.Generator().manual_seed(seed))
        for dtype in dtypes:
            rounded, band = band_of(kernel.formula, inputs, dtype)
            with torch.no_grad():
                out = kernel.run(**{n: x.to(dtype).to(device) for n, x in inputs.items()}).cpu()
            lines.append(row("kernel", name, dtype, {"shape": kernel.shape}, deviation(out, rounded), band))
    return lines


def emulated_deviation(
    shape: Shape = SHAPES[5], bits: Sequence[int] = (4, 7, 10, 16, 23), tiles: Sequence[int | None] = (None, 256, 64, 16)
) -> list[dict[str, Any]]:
    """Deviations of :func:`tiled_attention` from float64, over mantissa bits and keys per tile (None: all in one)."""
    q, k, v = shape.draw().values()
    exact = exact_attention(q, k, v)
    return [
        {"bits": b, "tile": tile, **asdict(shape), **asdict(deviation(tiled_attention(q, k, v, bits=b, tile=tile), exact))}
        for b in bits
        for tile in tiles
    ]


def machine(device: str) -> dict[str, Any]:
    """Where the numbers are from."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    found["gpu"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {**found, "platform": platform.platform()}


def measure(backends: Sequence[str] | None, device: str, quick: bool, trajectories: bool) -> dict[str, Any]:
    """Everything the command writes."""
    shapes = QUICK if quick else SHAPES
    found: dict[str, Any] = {"machine": machine(device), "quick": quick}
    found["attention"] = attention_deviation(backends, shapes, device=device)
    found["kernels"] = kernel_deviation(device=device)
    found["emulated"] = emulated_deviation(replace(SHAPES[5], queries=32), (7, 23)) if quick else emulated_deviation()
    if trajectories:
        # The pipelines stand on attention; only this command looks up at them.
        images = importlib.import_module("genkit.pipelines.deviation")
        found["trajectories"] = images.trajectory_deviation(backends, device=device, quick=quick)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module. Exits with an error if a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m genkit.attention.deviation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for deviation.md, deviation.json and deviation.png")
    parser.add_argument("--quick", action="store_true", help="few shapes, images and steps")
    parser.add_argument("--backends", nargs="+", help="default: all that can be used here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-trajectories", action="store_true", help="leave out the images of the built-in models")
    args = parser.parse_args(argv)
    report = importlib.import_module("genkit.attention.deviation_report")
    try:
        found = measure(args.backends, args.device, args.quick, not args.no_trajectories)
    except Unavailable as error:
        parser.error(str(error))
    print("\n".join(report.markdown(found, details=False)))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "deviation.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "deviation.md").write_text("\n".join(report.markdown(found)) + "\n")
        (args.out / "deviation.png").write_bytes(report.plot(found))
    exceeded = [line for line in found["attention"] + found["kernels"] if line.get("exceeds")]
    if exceeded:
        raise SystemExit("\n".join(f"{line['name']}, {line['dtype']}: {line['exceeds']}" for line in exceeded))


if __name__ == "__main__":
    main()
