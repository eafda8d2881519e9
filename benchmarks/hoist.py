"""What does it save to compute once what is the same at every step? Linear layers and CPU seconds, with and without hoist.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/hoist.py [--out docs/runs/hoist.json]

Networks of random weights in the shapes of small models, under CFG. Runs with and without alternate in one process, in an order
that is turned round every time; a time share is the least time with over the least without, beside those of the rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import torch
from record import save
from torch import Tensor, nn

from genkit.guidance import CFG
from genkit.models.flowar import FlowAR, FlowARConfig
from genkit.pipelines.hoist import hoist
from genkit.samplers.autoregressive.flow_scale import GuidedFlow, next_scale_flow


class Case(NamedTuple):
    """A network, a run of it in ``steps`` steps, and what it shows."""

    network: nn.Module
    run: Callable[[int], Tensor]
    about: str


def dit(width: int, depth: int, side: int, batch: int) -> Case:
    net = diffusers.DiTTransformer2DModel(
        sample_size=side, num_layers=depth, attention_head_dim=64, num_attention_heads=width // 64, norm_num_groups=4
    ).eval()
    labels = torch.tensor([*range(batch), *[1000] * batch])

    def run(steps: int) -> Tensor:
        x = noise(2 * batch, 4, side, side)
        for level in range(999, 0, -1000 // steps):
            x = x - net(x, timestep=torch.full((2 * batch,), level), class_labels=labels, return_dict=False)[0][:, :4] / steps
        return x

    return Case(net, run, f"DiT, width {width}, {depth} blocks, {(side // 2) ** 2} tokens, {2 * batch} rows")


def with_text(net: nn.Module, side: int, tokens: int, dim: int, batch: int, about: str, **more: Any) -> Case:
    text = noise(2 * batch, tokens, dim)

    def run(steps: int) -> Tensor:
        x = noise(2 * batch, 4, side, side)
        for level in range(999, 0, -1000 // steps):
            t = torch.full((2 * batch,), level)
            x = x - net(x, timestep=t, encoder_hidden_states=text, **more, return_dict=False)[0][:, :4] / steps
        return x

    return Case(net.eval(), run, f"{about}, {tokens} tokens of text, {2 * batch} rows")


def flowar(batch: int) -> Case:
    config = FlowARConfig(128, 4, 256, 4, cross=True, heads=4, flow_heads=4, patch_nums=(1, 2, 4, 8), channels=16, num_classes=10)
    model = FlowAR(config).eval()
    labels = torch.arange(batch)

    def run(steps: int) -> Tensor:
        guided = GuidedFlow(model, CFG(2.0), {"cond": labels, "uncond": torch.full_like(labels, 10)}, batch)
        return next_scale_flow(guided, range(batch), steps=steps + 1)

    return Case(model, run, f"FlowAR with cross-attention, width 256, 4 blocks, up to 64 tokens, {2 * batch} rows")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def cases() -> dict[str, Case]:
    pixart = diffusers.PixArtTransformer2DModel(
        sample_size=32, num_layers=6, attention_head_dim=64, num_attention_heads=6, cross_attention_dim=384,
        caption_channels=1024, use_additional_conditions=False, in_channels=4, out_channels=8, norm_num_groups=4,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=1, cross_attention_dim=768, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    added = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {
        "dit_16_tokens": dit(256, 8, 8, 4),
        "dit_256_tokens": dit(384, 12, 32, 2),
        "pixart": with_text(pixart, 32, 120, 1024, 1, "PixArt, width 384, 6 blocks, 256 tokens", **added),
        "unet": with_text(unet, 32, 77, 768, 1, "UNet of Stable Diffusion, 64 to 128 channels, 32 x 32"),
        "flowar": flowar(4),
    }


def measure(case: Case, steps: int, repeats: int) -> dict[str, Any]:
    def once(flag: bool) -> tuple[Tensor, float]:
        start = time.process_time()
        with hoist(case.network, range(999, 0, -1000 // steps)) if flag else nullcontext():
            out = case.run(steps)
        return out, time.process_time() - start

    called, plain = [0], nn.functional.linear
    nn.functional.linear = lambda *args: (called.__setitem__(0, called[0] + 1), plain(*args))[1]
    outs, counts = [], []
    for flag in (False, True):
        called[0] = 0
        outs.append(once(flag)[0])
        counts.append(called[0])
    nn.functional.linear = plain
    shares, times = [], ([], [])
    for k in range(repeats):
        for flag in (False, True) if k % 2 else (True, False):
            times[flag].append(once(flag)[1])
        shares.append(times[True][-1] / times[False][-1])
    change = float((outs[1] - outs[0]).norm() / outs[0].norm())
    return {
        "about": case.about, "steps": steps, "linear_calls": counts, "seconds": [min(t) for t in times],
        "time_share": min(times[True]) / min(times[False]), "rounds": sorted(shares), "change": change,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = {}
    for name, case in cases().items():
        table[name] = row = measure(case, args.steps, args.repeats)
        calls, rounds = row["linear_calls"], row["rounds"]
        print(
            f"{name:16} {calls[0]:6} -> {calls[1]:6} linear layers   time share {row['time_share']:.3f}   "
            f"(rounds {rounds[0]:.3f} to {rounds[-1]:.3f})   change {row['change']:.1e}   {row['about']}"
        )
    if args.out:
        save(args.out, {"networks": table, "repeats": args.repeats})


if __name__ == "__main__":
    main()
