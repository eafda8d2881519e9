"""Write the model card, genkit/assets/cifar10/README.md, from the weights' metadata and a run file.

python benchmarks/model_card.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "genkit" / "assets" / "cifar10"
MARKS = ("<!-- models: begin -->", "<!-- models: end -->")


def read(name: str) -> tuple[dict[str, Any], int, float]:
    """Metadata, number of weights, and size in MB of one file."""
    path = ASSETS / name
    with safe_open(path, framework="pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {})["config"])
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (safe_open is no mapping)
    return about, count, path.stat().st_size / 1e6


def schedule(history: list[dict[str, Any]]) -> str:
    """The total the decay was planned for, and where it was changed on the way."""
    parts = [f"{part['recipe']['images']:,} from image {part['from_image']:,}" for part in history]
    return f"images in all, as planned while training: {'; '.join(parts)}"


def section() -> str:
    main, count, size = read("diffusion.safetensors")
    weak, _, _ = read("diffusion_weak.safetensors")
    network, recipe = main["network"], main["recipe"]
    run = json.loads((ROOT / "docs" / "runs" / "claims.json").read_text())
    best = min(run["guidances"], key=lambda entry: entry["metrics"]["frechet"]["value"])
    plain = next(entry for entry in run["guidances"] if entry["label"] == "none")
    fd = plain["metrics"]["frechet"]
    lowest = f"{best['metrics']['frechet']['value']:.2f} with `{best['label']}`"
    score = f"{fd['title']} {fd['value']:.2f} without guidance, {lowest}"
    lines = [
        "## Diffusion",
        "",
        "`diffusion.safetensors`, and `diffusion_weak.safetensors`, an early EMA snapshot of the same run (model `weak`).",
        "",
        "| | |",
        "|---|---|",
        "| data | CIFAR-10 (JPEG copy), 50,000 training images, 32x32, horizontal flips |",
        f"| network | U-Net, {count / 1e6:.2f} M weights, half precision, {size:.1f} MB; channels {network['channels']}, "
        f"{network['blocks']} block a level, patch {network['patch']}, attention at level {network['attention']} |",
        f"| preconditioning | EDM, sigma_data {main['sigma_data']}, sigma {main['sigma_min']} to {main['sigma_max']:g} |",
        f"| loss | EDM, ln sigma ~ N({recipe['p_mean']}, {recipe['p_std']}^2), labels dropped with probability "
        f"{recipe['label_dropout']} |",
        f"| optimizer | AdamW, batch {recipe['batch']}, lr {recipe['lr']} with warm-up, linear decay over the last "
        f"{recipe['decay']:.0%}; EMA half-life {recipe['ema_halflife']:.0%} of the images seen |",
        f"| training | {main['images']:,} images, {main['images'] // recipe['batch']:,} steps, "
        f"{main['seconds'] / 60:.0f} minutes of wall time in the training loop (weak snapshot: {weak['images']:,} images) |",
        f"| schedule | {schedule(main['history'])} |",
        f"| hardware | {main['hardware']}, precision {'float32' if main['precision'] == 'no' else main['precision']} |",
        f"| measured | {score}; {plain['n']:,} images, see `docs/results.md` |",
        "",
        "It is a small model, made to be trained and run on a CPU: use it to try and compare methods, not for its pictures.",
        "Classes 0 to 9 are CIFAR-10's; label 10 is the dropped label, the unconditional branch.",
        "",
        "Made again, or continued, by:",
        "",
        "```",
        f"python -m genkit.training.cifar10_diffusion --data cifar10_jpeg.npz --images {recipe['images']} \\",
        "  --export genkit/assets/cifar10",
        "```",
    ]
    return "\n".join(lines)


def classifier() -> str:
    with safe_open(ASSETS / "classifier.safetensors", framework="pt") as file:
        about = file.metadata() or {}
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    with safe_open(ASSETS / "reference.safetensors", framework="pt") as file:
        reference = file.metadata() or {}
        width, kept = file.get_tensor("mean").numel(), len(file.get_tensor("features"))
    recipe, network = json.loads(about["recipe"]), json.loads(about["config"])
    images = sum(recipe["cycles"])
    once, both = float(about["test_accuracy"]), float(about["test_accuracy_flip"])
    lines = [
        "## Classifier",
        "",
        f"`classifier.safetensors`: the feature extractor ({width} features) behind FD-CIFAR10, which is no FID.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {about['dataset']}, 50,000 training images, flips, shifts of up to {recipe['shift']} pixels |",
        f"| network | {count / 1e6:.2f} M weights; whitened {network['patch']}x{network['patch']} patches, channels "
        f"{network['channels']}, global average pooling |",
        f"| training | {images:,} images, {int(about['steps']):,} steps in {len(recipe['cycles'])} learning-rate cycles, batch "
        f"{recipe['batch']}, SGD with Nesterov momentum, {int(about['seconds']) / 60:.0f} minutes |",
        f"| hardware | {about['hardware']} |",
        f"| test accuracy | {both:.2%} (logits: mean over the image and its mirror image); {once:.2%} by one pass; "
        f"{int(about['test_images']):,} test images, half-precision weights |",
        f"| reference | `reference.safetensors`: mean and covariance over {int(reference['num_images']):,} training images; "
        f"features of {kept:,} ({reference['features_of']}) |",
        "",
        "```",
        "python -m genkit.training.cifar10_classifier --data cifar10_jpeg.npz --export",
        "```",
    ]
    return "\n".join(lines)


def minority() -> str:
    with safe_open(ASSETS / "minority.safetensors", framework="pt") as file:
        header = file.metadata() or {}
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    about, config = json.loads(header["about"]), json.loads(header["config"])
    r, shares = (
        about["recipe"],
        "; ".join(
            f"sigma {sigma}: {found['exact']:.0%} exactly, {found['within_one']:.0%} within one"
            for sigma, found in about["held_out"].items()
        ),
    )
    lines = [
        "## Minority classifier",
        "",
        "`minority.safetensors`: the level of rarity of a noisy image, for `MinorityGuidance` (model `minority`).",
        "",
        "| | |",
        "|---|---|",
        f"| data | CIFAR-10 (JPEG copy), 50,000 training images less {r['held_out']:.0%} held out |",
        f"| levels | {r['levels']} quantile bins of the minority score: distance in the {about['distance']} to what the "
        f"diffusion model restores at sigma {r['sigma']:g}, mean of {r['draws']} noises |",
        f"| network | {count / 1e6:.2f} M weights, channels {config['channels']} |",
        f"| training | {r['images']:,} images, batch {r['batch']}, AdamW, lr {r['lr']}, "
        f"ln sigma ~ N({r['p_mean']}, {r['p_std']}^2), {about['seconds'] / 60:.0f} minutes after scoring |",
        f"| hardware | {about['hardware']} |",
        f"| held-out images, right level | {shares}; by chance {1 / r['levels']:.0%} exactly |",
        "",
        "```",
        "python -m genkit.training.minority --data cifar10_jpeg.npz --export",
        "```",
    ]
    return "\n".join(lines)


#: Files of the autoregressive models: what each is, and the recipe's module with what it is made from.
PIECES = {
    "tokenizer": ("tokenizer: SimVQ, 8 x 8 tokens", "tokenizer --quantizer simvq"),
    "next_token": ("next-token model, a LlamaGen", "next_token --tokenizer tokenizer.safetensors"),
    "drafter": ("its drafter, an EAGLE head", "drafter --model next_token.safetensors --tokenizer tokenizer.safetensors"),
    "next_token_cca": ("its twin that needs no guidance", "cca --model next_token.safetensors --tokenizer tokenizer.safetensors"),
    "tokenizer_multiscale": ("tokenizer: residual, scales of 1, 2, 3, 5 and 8", "tokenizer --quantizer multiscale"),
    "next_scale": ("next-scale model, a VAR", "next_scale --tokenizer tokenizer_multiscale.safetensors"),
}


def autoregressive() -> str:
    """One row and one command for each file."""
    head = ["| file | what | weights | network | training | measured |", "|---|---|---:|---|---|---|"]
    lines, commands, hardware = [], [], ""
    for name, (what, command) in PIECES.items():
        about, count, size = read(f"{name}.safetensors")
        n, r = about["network"], about["recipe"]
        if "channels" in n:
            network = f"{n['channels']} channels, {n['size']:,} codes of {n['dim']} numbers"
        else:
            depth = n.get("layers", n.get("depth", 1))
            network = f"{depth} layer{'s' * (depth > 1)}, width {n['width']}, {n['heads']} heads"
        minutes = about["seconds"] / 60
        training = f"{about['images']:,} images, batch {r['batch']}, AdamW, lr {r['lr']:g}, {minutes:.0f} min"
        if "beta" in r:
            training += f", beta {r['beta']:g}, lambda {r['lam']:g}"
        weights = f"{count / 1e6:.2f} M, {size:.1f} MB"
        lines.append(f"| `{name}.safetensors` | {what} | {weights} | {network} | {training} | {_measured(about)} |")
        more = f"--images {r['images']} --data cifar10_jpeg.npz --export {name}.safetensors"
        commands.append(f"python -m genkit.training.{command} {more}")
        hardware = about["hardware"]
    text = (
        "`builtin/cifar10-next-token`, `builtin/cifar10-next-token-cca` and `builtin/cifar10-next-scale`; half precision; "
        "CIFAR-10 (JPEG copy), 50,000 training images, horizontal flips, labels dropped, averaged weights. Trained on "
        f"{hardware}; minutes are of wall time in the training loop, on a machine that did other things too. Images made with "
        "them are measured in `docs/results.md`."
    )
    return "\n".join(["## Autoregressive models", "", text, "", *head, *lines, "", "```", *commands, "```"])


def _measured(about: dict[str, Any]) -> str:
    """What the header says of images that were not trained on."""
    if "psnr" not in (test := about.get("test", {})):
        return ""
    return f"test images: {test['psnr']:.1f} dB PSNR, {test['usage']:.1%} of the codes used, perplexity {test['perplexity']:.0f}"


def main() -> None:
    card = ASSETS / "README.md"
    text = card.read_text()
    block = f"{MARKS[0]}\n{section()}\n\n{classifier()}\n\n{minority()}\n\n{autoregressive()}\n{MARKS[1]}"
    found = re.search(f"{MARKS[0]}.*?{MARKS[1]}", text, re.DOTALL)
    card.write_text(text.replace(found.group(0), block) if found else f"{text.rstrip()}\n\n{block}\n")


if __name__ == "__main__":
    main()
