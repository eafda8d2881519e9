"""DiT sampling beside diffusers' DiTPipeline: CPU seconds of DDIM steps with CFG, float32, the same random weights.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/diffusion_speed.py [--batch 1 4] \\
        [--out docs/runs/diffusion_speed.json]

DiT-S/2 at 256 pixels (256 tokens) with a tiny image decoder, the same first noise and network rows on all sides. They run in
turns in one process; a figure is the least of several rounds. Exits with an error if images differ by more than 1e-4, or if the
best of genkit's ways is not ``--least`` times as fast.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from record import save
from torch import Tensor, nn

from genkit.pipelines.diffusers_pipeline import DiffusersPipeline

SIZES = {"S": (12, 6), "B": (12, 12)}
GUIDANCE = 4.0


def randomized(module: nn.Module) -> nn.Module:
    """Also what starts at zero, and would hide what it is given."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim > 1:
                value.normal_(std=0.02, generator=generator)
    return module.eval().requires_grad_(False)


def pipeline(size: str) -> Any:
    torch.manual_seed(0)
    layers, heads = SIZES[size]
    network = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=layers, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    pipe = DiTPipeline(randomized(network), randomized(vae), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ways(size: str, batch: int, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Images (B, H, W, 3) by each way; compiled ones have a network of their own."""
    labels = [(100 * i + 207) % 1000 for i in range(batch)]
    pipe, other = pipeline(size), pipeline(size)
    plain, compiled = DiffusersPipeline(pipe), DiffusersPipeline(other).compile()

    def given() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {"num_inference_steps": steps, "generator": generator, "guidance_scale": GUIDANCE, "output_type": "np"}

    def images(call: Callable[..., Any], **options: Any) -> Tensor:
        return torch.as_tensor(call(class_labels=labels, **given(), **options).images)

    return {
        "diffusers": lambda: images(pipe),
        "genkit": lambda: images(plain),
        "genkit, hoist": lambda: images(plain, hoist=True),
        "genkit, compiled": lambda: images(compiled),
    }


def measure(size: str, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    found, images, first = dict[str, float](), dict[str, Tensor](), 0.0
    calls = ways(size, batch, steps)
    for name, call in calls.items():  # once outside the measurement: compilation, caches
        begin = time.process_time()
        images[name] = call()
        first = time.process_time() - begin
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            found[name] = min(found.get(name, float("inf")), time.process_time() - begin)
        print(", ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True)
    difference = max(float((images[name] - images["diffusers"]).abs().max()) for name in images)
    ratios = {name: found["diffusers"] / value for name, value in found.items()}
    return {"seconds": found, "ratio": ratios, "first_compiled_call": first, "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=1.1)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, failed = {}, []
    for batch in args.batch:
        name = f"DiT-{args.size}/2, 256 tokens, batch {batch}"
        found[name] = r = measure(args.size, batch, args.steps, args.rounds)
        best = max(ratio for way, ratio in r["ratio"].items() if way != "diffusers")
        print(f"{name}: {best:.2f} times as fast, images differ by {r['largest_difference']:.1e}", flush=True)
        failed += [f"{name}: {best:.2f} times as fast, not {args.least}"] if best < args.least else []
        failed += [f"{name}: images differ"] if r["largest_difference"] > 1e-4 else []
    if args.out:
        save(args.out, {"models": found, "steps": args.steps, "rounds": args.rounds})
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
