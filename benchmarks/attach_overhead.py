"""Cost of ``genkit.attach`` beside the pipeline: microseconds a network call, with a no-op network, batch 4.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/attach_overhead.py [--out docs/runs/attach_overhead.json]

One pipeline, its own CFG and attached ones interleaved in one process. A call costs the CPU time from one call of the network
to the next, so the set-up of a run does not count: of each step the minimum over several runs, and of these the mean over a run.
Own CFG and CFG attached give the network the same rows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import torch
from overhead import BATCH, SHAPE
from record import save

from genkit.pipelines.attach import attach

STEPS, FIRST = 100, 5  # of a run, and those that do not count
GUIDANCES = ("CFG(3.0)", "Interval(CFG(3.0), 0.28, 5.42)", "APG(3.0)", "none")
stamps: list[int] = []  # when the network was called


def pipeline(scheduler: str) -> Any:
    """Stable Diffusion with the forward of a tiny UNet replaced by a no-op, and no decoder."""
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    unet = diffusers.UNet2DConditionModel(
        sample_size=SHAPE[-1], block_out_channels=(8,), layers_per_block=1, norm_num_groups=1, cross_attention_dim=8, **kinds
    ).eval()
    stored = torch.zeros(2 * BATCH, *SHAPE)

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        stamps.append(time.thread_time_ns())
        return (stored[: len(sample)],)

    unet.forward = forward
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=getattr(diffusers, scheduler)(**betas), requires_safety_checker=False, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def caller(pipe: Any, guidance: str | None) -> Callable[[int], None]:
    text = {name: torch.zeros(BATCH, 77, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    size = {"height": SHAPE[-1], "width": SHAPE[-1], "output_type": "latent"}

    def own(steps: int) -> None:
        seed = torch.Generator().manual_seed(0)
        pipe(**text, **size, guidance_scale=3.0, num_inference_steps=steps, generator=seed)

    def attached(steps: int) -> None:
        with attach(pipe, guidance):
            own(steps)

    return own if guidance is None else attached


def measure(runs: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """Microseconds a call of each."""
    best = {name: [float("inf")] * (STEPS - FIRST - 1) for name in runs}
    for run in runs.values():
        run(FIRST)
    for _ in range(repeats):
        for name, run in runs.items():
            stamps.clear()
            run(STEPS)
            took = (after - before for before, after in itertools.pairwise(stamps[FIRST:]))
            best[name] = [min(pair) for pair in zip(best[name], took, strict=True)]
    return {name: sum(steps) / len(steps) / 1e3 for name, steps in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default="")
    parser.add_argument("--limit", type=float, default=100.0, help="fail if attach adds more than this with CFG ...")
    parser.add_argument("--ratio", type=float, default=0.6, help="... and more than this share of the pipeline's own cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    runs: dict[str, Callable[[int], None]] = {}
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    for scheduler in schedulers:
        pipe = pipeline(scheduler)
        runs[f"{scheduler}, own CFG"] = caller(pipe, None)
        runs |= {f"{scheduler}, {text}": caller(pipe, text) for text in GUIDANCES}
    result = measure(runs, args.repeats)
    added = {name: value - result[f"{name.split(', ')[0]}, own CFG"] for name, value in result.items() if "own" not in name}
    for name, value in result.items():
        print(f"{value:8.1f} us/call  {added.get(name, 0.0):+8.1f}  {name}")
    if args.out:
        about = {"us_per_call": result, "added_us_per_call": added, "batch": BATCH, "shape": list(SHAPE), "repeats": args.repeats}
        about["load_average"] = round(os.getloadavg()[1], 1)  # other work on the machine makes every figure larger
        save(args.out, about)
    own = {name.split(", ")[0]: value for name, value in result.items() if "own" in name}
    over = [n for n, v in added.items() if "CFG" in n and v > max(args.limit, args.ratio * own[n.split(", ")[0]])]
    if over:
        raise SystemExit(f"adds more than {args.limit:.0f} us a call: {', '.join(over)}")


if __name__ == "__main__":
    main()
