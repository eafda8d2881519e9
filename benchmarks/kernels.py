"""The fused passes of ``genkit.attention.kernels`` beside plain torch: bytes by the cost models, and times.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/kernels.py [--out docs/runs/kernels.json]

On the CPU: milliseconds of a thread for genkit's own layers and methods ("plain") and for the torch form of the kernel
("fallback"), interleaved, the minimum of several. On a GPU, where there is one, also the Triton program ("fused"), with the share
of the memory bandwidth that its bytes over its time make; the bandwidth is that of a copy of 1 GiB in the same run.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save
from torch import Tensor
from torch.nn import functional as F

from genkit.attention.kernels import gated_modulate, guidance_update, modulate, qk_norm_rope, sample_logits
from genkit.attention.kernels.guidance import bytes_moved as guidance_bytes
from genkit.attention.kernels.modulate import bytes_moved as modulate_bytes
from genkit.attention.kernels.qk_norm_rope import bytes_moved as qk_bytes
from genkit.attention.kernels.sample_logits import bytes_moved as sample_bytes
from genkit.guidance.apg import APG
from genkit.guidance.base import StepInfo
from genkit.guidance.cfg import CFG
from genkit.models.llama import RMSNorm, rope_table, rotate, turns
from genkit.models.var_layers import layer_norm
from genkit.samplers.autoregressive.filters import Filters

REPEATS, BUDGET = 30, 1.5  # of each function, and the seconds after which a case stops repeating
Make = Callable[[str, torch.dtype], tuple[Callable[[], Any], Callable[[], Any]]]


class Case(NamedTuple):
    """``make(device, dtype)`` gives the plain way and the kernel's; ``size(itemsize, fused)`` counts bytes."""

    name: str
    shape: str
    make: Make
    size: Callable[[int, bool], int]
    dtype: torch.dtype = torch.float32


def var_norm(batch: int, heads: int, tokens: int, dim: int) -> Make:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
        qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype)
        g = torch.full((1, heads, 1, 1), math.log(4), device=device)

        def plain() -> Any:
            q, k = F.normalize(qkv[..., :2, :, :], dim=-1).permute(2, 0, 3, 1, 4)
            return q * g.clamp(max=math.log(100)).exp().to(q.dtype), k

        def kernel() -> Any:
            q, k, _ = qkv.permute(2, 0, 3, 1, 4)
            return qk_norm_rope(q, k, norm="l2", q_weight=g.clamp(max=math.log(100)).exp().view(heads, 1))

        return plain, kernel

    return make


def rope(batch: int, heads: int, side: int, dim: int, norm: bool) -> Make:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
        qkv = torch.randn(batch, side * side, 3, heads, dim, device=device, dtype=dtype)
        table, layer = rope_table(side * side, dim, 0).to(device), RMSNorm(dim).to(device, dtype)
        turn = turns(table).unsqueeze(-3)

        def plain() -> Any:
            x = qkv[..., :2, :, :]
            q, k = rotate(layer(x) if norm else x, turn).unbind(-3)
            return q.transpose(1, 2), k.transpose(1, 2)

        def kernel() -> Any:
            q, k, _ = qkv.permute(2, 0, 3, 1, 4)
            options: Any = {"norm": "rms", "eps": 1e-5, "q_weight": layer.weight, "k_weight": layer.weight} if norm else {}
            return qk_norm_rope(q, k, table, **options)

        return plain, kernel

    return make


def adaln(batch: int, tokens: int, width: int, gated: bool) -> Make:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, branch = torch.randn(2, batch, tokens, width, device=device, dtype=dtype)
        gate, scale, shift = torch.randn(3, batch, 1, width, device=device, dtype=dtype)

        def plain() -> Any:
            h = torch.addcmul(x, gate, branch) if gated else x
            return h, torch.addcmul(shift, layer_norm(h), 1 + scale)

        return plain, lambda: gated_modulate(x, branch, gate, scale, shift) if gated else modulate(x, scale, shift)

    return make


def update(shape: tuple[int, ...], method: CFG | APG) -> Make:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
        c, u, average = torch.randn(3, *shape, device=device, dtype=dtype)
        info = StepInfo(0, 1, 0.0, "step", 1.0, 0.0, 1.0, 1.0, c)
        state = average if isinstance(method, APG) and method.momentum else None
        options = {n: getattr(method, n) for n in ("eta", "momentum", "threshold")} if isinstance(method, APG) else {}
        return (
            lambda: method.combine(info, {"cond": c, "uncond": u}, state),
            lambda: guidance_update(c, u, method.scale, average=state, **options),
        )

    return make


def draw(rows: int, vocabulary: int, filters: Filters) -> Make:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
        c, u = 3 * torch.randn(2, rows, vocabulary, device=device, dtype=dtype)
        waits = torch.empty(rows, vocabulary, device=device).exponential_()
        options: Any = {n: getattr(filters, n) for n in ("temperature", "top_k", "top_p", "order")}
        return (
            lambda: (filters.probabilities(u.lerp(c, 4.0)) / waits).argmax(-1),
            lambda: sample_logits(c, waits, uncond=u, scale=4.0, **options),
        )

    return make


def cases(large: bool) -> list[Case]:
    """The layers of known models; on a GPU in batches that fill it."""
    b = 64 if large else 2
    half = torch.bfloat16
    apg = {"eta": 0.0, "momentum": -0.5, "threshold": 2.5}
    latents, size = (4 * b, 4, 32, 32), 4096
    top_k, both = Filters(top_k=2000), Filters(top_k=900, top_p=0.96, order="var")
    out = [
        Case("qk l2 norm (VAR-d16, last scale)", f"{b} x 16 x 256 x 64", var_norm(b, 16, 256, 64),
             lambda i, f: qk_bytes(b, 16, 256, 64, itemsize=i, rope=False, fused=f)),
        Case("qk RoPE (LlamaGen-XL, prefill)", f"{b} x 20 x 256 x 64", rope(b, 20, 16, 64, False),
             lambda i, f: qk_bytes(b, 20, 256, 64, itemsize=i, norm=None, fused=f)),
        Case("qk RMS norm + RoPE", f"{b} x 16 x 256 x 72", rope(b, 16, 16, 72, True),
             lambda i, f: qk_bytes(b, 16, 256, 72, itemsize=i, norm="rms", weight=True, fused=f)),
        Case("modulate (DiT-XL, 256 tokens)", f"{b} x 256 x 1152", adaln(b, 256, 1152, False),
             lambda i, f: modulate_bytes(b, 256, 1152, itemsize=i, fused=f)),
        Case("gated modulate (DiT-XL, 256 tokens)", f"{b} x 256 x 1152", adaln(b, 256, 1152, True),
             lambda i, f: modulate_bytes(b, 256, 1152, itemsize=i, gated=True, fused=f)),
        Case("CFG", " x ".join(map(str, latents)), update(latents, CFG(4.0)),
             lambda i, f: guidance_bytes(4 * b, size, itemsize=i, eta=1.0, fused=f)),
        Case("APG", " x ".join(map(str, latents)), update(latents, APG(4.0)),
             lambda i, f: guidance_bytes(4 * b, size, itemsize=i, fused=f)),
        Case("APG, momentum, threshold", " x ".join(map(str, latents)), update(latents, APG(4.0, **apg)),
             lambda i, f: guidance_bytes(4 * b, size, itemsize=i, **apg, fused=f)),
        Case("draw, top_k 2000", f"{4 * b} x 16384", draw(4 * b, 16384, top_k),
             lambda i, f: sample_bytes(4 * b, 16384, itemsize=i, top_k=2000, fused=f)),
        Case("draw, top_k 900, top_p 0.96", f"{4 * b} x 4096", draw(4 * b, 4096, both),
             lambda i, f: sample_bytes(4 * b, 4096, itemsize=i, top_k=900, top_p=0.96, fused=f)),
    ]  # fmt: skip
    return out if not large else [case._replace(dtype=half) if "qk" in case.name or "mod" in case.name else case for case in out]


@contextmanager
def kernels(on: bool) -> Any:
    before = os.environ.get("GENKIT_KERNELS", "1")
    os.environ["GENKIT_KERNELS"] = "1" if on else "0"
    yield
    os.environ["GENKIT_KERNELS"] = before


def cpu_times(*functions: Callable[[], Any]) -> list[float]:
    """Milliseconds of the thread, of each: the minimum over interleaved repeats."""
    best, end = [math.inf] * len(functions), time.monotonic() + BUDGET * len(functions)
    for f in functions:
        f()
    for _ in range(REPEATS):
        for i, f in enumerate(functions):
            start = time.thread_time()
            f()
            best[i] = min(best[i], 1e3 * (time.thread_time() - start))
        if time.monotonic() > end:
            break
    return best


def gpu_time(function: Callable[[], Any]) -> float:
    """Milliseconds on the GPU alone, by events: the median of single calls, with the cache flushed before each."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(5):
        function()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy."""
    source: Tensor = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * gpu_time(lambda: target.copy_(source)))


def row(case: Case, device: str, limit: float) -> dict[str, Any]:
    torch.manual_seed(0)
    plain, kernel = case.make(device, case.dtype)
    item = case.dtype.itemsize
    out: dict[str, Any] = {
        "kernel": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "on": device,
    }
    out |= {"bytes_plain": case.size(item, False), "bytes_fused": case.size(item, True)}
    if device == "cpu":
        with kernels(False):
            a, b = cpu_times(plain, kernel)
        return out | {"plain_ms": round(a, 4), "fallback_ms": round(b, 4)}
    with kernels(False):
        a, b = gpu_time(plain), gpu_time(kernel)
    with kernels(True):
        c = gpu_time(kernel)
    share = out["bytes_fused"] / (1e-3 * c) / limit
    return out | {
        "plain_ms": round(a, 4),
        "fallback_ms": round(b, 4),
        "fused_ms": round(c, 4),
        "bandwidth_share": round(share, 3),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, result = [], {"threads": torch.get_num_threads()}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        limit = bandwidth() if device == "cuda" else math.nan
        if device == "cuda":
            result |= {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": round(limit)}
        for case in cases(large=device == "cuda"):
            rows.append(row(case, device, limit))
            print("  ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if arguments.out:
        save(arguments.out, {**result, "rows": rows})


if __name__ == "__main__":
    main()
