"""Cost of guidance and sampler beside the network: microseconds a step with a no-op denoiser, batch 4, CFG.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/overhead.py [--out docs/runs/overhead.json]

genkit, diffusers' DiTPipeline and a bare loop run interleaved in one process; each figure is the slope between a short and
a long run (so set-up does not count), from the minimum CPU time of several repeats.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from record import save
from torch import Tensor

from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import parse
from genkit.samplers import SAMPLERS, sample

BATCH, SHAPE, SHORT, LONG = 4, (4, 32, 32), 50, 250


class NoOp:
    """A denoiser that costs nothing: it hands back a stored tensor."""

    path = noise.VE

    def __init__(self) -> None:
        self.out = torch.zeros(2 * BATCH, *SHAPE)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return self.out[: len(x)]


def genkit_run(guidance: str, sampler: str) -> Callable[[int], None]:
    rule, net, labels = parse(guidance), NoOp(), torch.arange(BATCH)
    conditions = {"cond": labels, "uncond": torch.full_like(labels, 1000)}
    x = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))

    def run(steps: int) -> None:
        with torch.no_grad():
            sample(Guided(net, rule, conditions, BATCH), x, noise.karras(steps), SAMPLERS[sampler], noise.VE)

    return run


def bare_ddim() -> Callable[[int], None]:
    """What one would write by hand: coefficients computed beforehand, batched CFG, DDIM in VP coordinates."""
    net, labels = NoOp(), torch.tensor([0, 1, 2, 3] + [1000] * 4)
    x0 = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))

    def run(steps: int) -> None:
        points = [noise.VP(float(v)) for v in noise.karras(steps)]
        sigmas = noise.karras(steps)[:-1, None].expand(-1, 2 * BATCH).contiguous()
        x = x0
        with torch.no_grad():
            for i in range(steps):
                (a, s), (a2, s2) = points[i], points[i + 1]
                eps = net(torch.cat([x, x]), sigmas[i], labels)
                cond, uncond = eps.chunk(2)
                eps = uncond + 3.0 * (cond - uncond)
                x = a2 * (x - s * eps) / a + s2 * eps

    return run


def dit_run(scheduler: str) -> Callable[[int], None]:
    """diffusers' pipeline as it is, with the forward of a tiny transformer and the decoder replaced by no-ops."""
    import diffusers

    size = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": SHAPE[-1], "in_channels": 4}
    transformer = diffusers.DiTTransformer2DModel(**size, out_channels=4, norm_num_groups=1, num_embeds_ada_norm=1000).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    stored = torch.zeros(2 * BATCH, *SHAPE)
    transformer.forward = lambda x, **_: SimpleNamespace(sample=stored[: len(x)])
    vae.decode = lambda z, **_: SimpleNamespace(sample=z[:, :3])
    pipe = diffusers.DiTPipeline(transformer, vae, getattr(diffusers, scheduler)())
    pipe.set_progress_bar_config(disable=True)

    def run(steps: int) -> None:
        seed = torch.Generator().manual_seed(0)
        pipe(list(range(BATCH)), guidance_scale=3.0, num_inference_steps=steps, output_type="np", generator=seed)

    return run


def cpu(run: Callable[[int], None], steps: int) -> float:
    start = time.process_time()
    run(steps)
    return time.process_time() - start


def measure(runs: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """Microseconds a step of each, interleaved, minimum over repeats at both lengths."""
    best = {(name, n): float("inf") for name in runs for n in (SHORT, LONG)}
    for run in runs.values():
        run(SHORT)
    for _ in range(repeats):
        for name, run in runs.items():
            for n in (SHORT, LONG):
                best[name, n] = min(best[name, n], cpu(run, n))
    return {name: (best[name, LONG] - best[name, SHORT]) / (LONG - SHORT) * 1e6 for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default="")
    parser.add_argument("--limit", type=float, default=80.0, help="fail if genkit's CFG with Euler or DDIM is above this ...")
    parser.add_argument("--ratio", type=float, default=1.9, help="... and above this multiple of the bare loop (a slow machine)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int], None]] = {"bare loop, DDIM": bare_ddim()}
    for sampler in ("euler", "ddim", "dpmpp_2m", "heun"):
        runs[f"genkit, CFG(3.0), {sampler}"] = genkit_run("CFG(3.0)", sampler)
    limited = ["genkit, CFG(3.0), euler", "genkit, CFG(3.0), ddim"]
    for text in ("Interval(CFG(3.0), 0.28, 5.42)", "APG(4.0, momentum=-0.5, threshold=5.0)", "Adaptive(CFG(3.0), 2.0)"):
        runs[f"genkit, {text}, euler"] = genkit_run(text, "euler")
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        runs[f"diffusers DiTPipeline, {scheduler}"] = dit_run(scheduler)
    result = measure(runs, args.repeats)
    for name, value in result.items():
        print(f"{value:8.1f} us/step  {name}")
    if args.out:
        save(
            args.out,
            {"us_per_step": result, "batch": BATCH, "shape": list(SHAPE), "repeats": args.repeats},
        )
    allowed = max(args.limit, args.ratio * result["bare loop, DDIM"])
    over = [name for name in limited if result[name] > allowed]
    if over:
        raise SystemExit(f"over {allowed:.0f} us/step: {', '.join(over)}")


if __name__ == "__main__":
    main()
