"""Checks of the machine: what is wrong, what is worth knowing, and what is in order."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from genkit_eval import provenance
from genkit_eval.command import check_device, load_pipeline, settle_sampler
from genkit_eval.errors import InputError
from genkit_eval.extractors import clip, dinov2, inception, load_extractor
from genkit_eval.extractors.base import MAIN
from genkit_eval.extractors.resize import clean
from genkit_eval.extractors.weights import WeightsFile, cache_folder, sha256_of
from genkit_eval.files import check_writable
from genkit_eval.generate import options_of
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.moments import Moments

Status = Literal["ok", "note", "wrong"]
#: What the commands import, by the extra that brings it.
EXTRAS = {"eval": ("torchmetrics", "scipy", "matplotlib", "jinja2", "optuna", "accelerate"), "diffusers": ("transformers",)}
FREE = 2e9  # bytes, below which a fetched network does not fit
IMAGES, STEPS, BATCH = 4, 4, 4
# Matrix products of other sizes round otherwise: a level or two of 255 is expected between batch sizes, more is not.
LEVELS, RELATIVE = 4, 1e-3


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    check: str
    status: Status
    text: str


def installed(distribution: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """``1.17.1+cpu`` as (1, 17, 1)."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdigit())


def check_packages() -> Iterator[Finding]:
    """What is installed, and what an extra would bring."""
    told = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    yield Finding("packages", "ok", told)
    for extra, names in EXTRAS.items():
        missing = [name for name in names if installed(name) is None]
        if missing:
            yield Finding(
                "packages", "note", f"{', '.join(missing)} not installed; pip install 'genkit-image[{extra}]' brings it"
            )


def check_torchvision() -> Iterator[Finding]:
    """One that was built for another torch cannot be imported, and takes transformers and torch-fidelity down with it."""
    found = installed("torchvision")
    if found is None:
        yield Finding("torchvision", "ok", "not installed, and not needed")
        return
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        yield Finding("torchvision", "ok", f"{found} beside torch {torch.__version__}")
        return
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    yield Finding(
        "torchvision",
        "wrong",
        f"{found} cannot be imported beside torch {torch.__version__} ({reason}); transformers, torch-fidelity and "
        "torchmetrics.image fail with it. Install the one built for this torch, or none",
    )


def check_scipy() -> Iterator[Finding]:
    """The matrix square root that other tools take FID from; here none is taken."""
    generator = torch.Generator().manual_seed(0)
    # Covariances that commute have a closed form: sum of (root a - root b)^2 of their eigenvalues.
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    first, second = (torch.rand(64, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    sides = [Moments.from_cov(1000, torch.zeros(64), basis @ values.diag() @ basis.T) for values in (first, second)]
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    error = abs(frechet_distance(sides[0], sides[1]) / expected - 1)
    yield Finding("Frechet distance", "ok" if error < 1e-9 else "wrong", f"relative error {error:.1e} on a closed form")
    found = installed("scipy")
    if found and (1, 11, 2) <= release(found) < (1, 13):
        yield Finding(
            "scipy", "note", f"sqrtm of {found} returns wrong numbers: do not compare with FIDs of other tools made with it"
        )
    elif found and release(found) >= (1, 18):
        yield Finding(
            "scipy", "note", f"{found} has no sqrtm(disp=): pytorch-fid, clean-fid and ADM's evaluator stop with a TypeError"
        )


def check_torchmetrics() -> Iterator[Finding]:
    """Its FID changed with version 1.8."""
    found = installed("torchmetrics")
    if found and release(found) >= (1, 8):
        text = f"its own FID resizes with antialias since 1.8 ({found} here), so it is not ADM's; here it is 'torchmetrics'"
        yield Finding("torchmetrics", "note", text)


def check_pillow() -> Iterator[Finding]:
    """Its bicubic on float channels is the rule ``clean``; its JPEG decoder decides the pixels of references."""
    pixels = torch.arange(3 * 40 * 28, dtype=torch.int64).mul(7919).remainder(256).reshape(1, 3, 40, 28).to(torch.uint8)
    ours = clean(pixels, 19)[0]
    theirs = [
        np.asarray(Image.fromarray(channel.numpy().astype(np.float32)).resize((19, 19), Image.Resampling.BICUBIC))
        for channel in pixels[0]
    ]
    error = float((ours - torch.from_numpy(np.stack(theirs)).clamp(0, 255)).abs().max())
    version = f"Pillow {installed('pillow')}, libjpeg {features.version('jpg')}"
    yield Finding("resize", "ok" if error < 2e-3 else "wrong", f"'clean' is within {error:.1e} level of {version}")


def check_machine(device: str) -> Iterator[Finding]:
    """The device, its arithmetic, and threads."""
    about = provenance.hardware(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check_device(device)
    yield Finding("device", "ok", f"{device}: {about.get('gpu', about['cpu'])}, {platform.system()}")
    threads = torch.get_num_threads()
    limits = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ)
    told = f"torch uses {threads} of {cores} cores{f' ({limits})' if limits else ''}"
    crowded = threads > cores
    yield Finding("threads", "note" if crowded else "ok", f"{told}; OMP_NUM_THREADS={cores} would be faster" if crowded else told)
    if device.startswith("cuda"):
        coarse = torch.get_float32_matmul_precision() != "highest" or os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"
        text = "TF32 is on for matrix products, which moves features in the third digit; leave float32_matmul_precision 'highest'"
        yield Finding("TF32", "wrong" if coarse else "ok", text if coarse else "off for matrix products, and in extractors")


def check_cache() -> Iterator[Finding]:
    """Where features and weights are kept."""
    folder = cache_folder()
    check_writable(folder, "GENKIT_CACHE")
    free = shutil.disk_usage(folder).free
    text = f"{folder} can be written, {free / 1e9:.1f} GB free"
    yield Finding("cache", "ok" if free > FREE else "note", text if free > FREE else f"{text}: too little for some networks")


def weights_files() -> dict[str, WeightsFile]:
    """The published files of the extractors."""
    sizes = {f"dinov2-vit-{size}-14": file for size, (_, file) in dinov2.MODELS.items()}
    return {inception.NAME: inception.WEIGHTS, **sizes, clip.NAME: clip.WEIGHTS}


def check_weights() -> Iterator[Finding]:
    """Those that are here have the published hash; others are fetched on first use."""
    absent = []
    for name, file in weights_files().items():
        path = next((p for p in (cache_folder() / file.name, *file.copies()) if p.is_file()), None)
        if path is None:
            absent.append(name)
            continue
        found = sha256_of(path)
        good = found == file.sha256
        text = f"{name}: {path} has sha256 {found[:12]}"
        yield Finding(
            "weights", "ok" if good else "wrong", text if good else f"{text}, published is {file.sha256[:12]}; delete it"
        )
    if absent:
        yield Finding("weights", "note", f"fetched on first use, or given by --weights: {', '.join(absent)}")


def check_generation(device: str, model: str) -> Iterator[Finding]:
    """An image is a function of its seed and class: twice the same, and alone as in a batch."""
    pipe = load_pipeline(model, device)
    sampler, steps = settle_sampler(pipe, None, None if hasattr(pipe, "sampler") else STEPS)
    how = {"guidance": _guidance(), "trace": "none", **options_of(pipe, sampler, steps)}
    labels, seeds = [k % pipe.num_classes for k in range(IMAGES)], list(range(IMAGES))
    first, again = (pipe(classes=labels, seeds=seeds, **how).pixels.cpu() for _ in range(2))
    alone = torch.cat([pipe(classes=[c], seeds=[s], **how).pixels.cpu() for c, s in zip(labels, seeds, strict=True)])
    same = torch.equal(first, again)
    yield Finding(
        "generation twice", "ok" if same else "wrong", f"{pipe.name}: {'the same bits' if same else _apart(first, again)}"
    )
    levels = int((first.int() - alone.int()).abs().max())
    status: Status = "ok" if levels == 0 else "note" if levels <= LEVELS else "wrong"
    yield Finding("batch 1 against 4", status, f"{pipe.name}: {_apart(first, alone)}")


def _guidance() -> Any:
    from genkit.guidance import parse

    return parse("CFG(3.0)")


def _apart(first: Tensor, second: Tensor) -> str:
    gap = (first.int() - second.int()).abs()
    return f"images differ by up to {int(gap.max())} levels of 255, {float((gap > 0).float().mean()):.2%} of the values"


def check_features(device: str) -> Iterator[Finding]:
    """Features of an image do not depend on the time or the batch."""
    extractor = load_extractor("builtin/cifar10", device)
    pixels = torch.randint(256, (BATCH, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, again = (extractor(pixels)[MAIN] for _ in range(2))
    alone = torch.cat([extractor(image[None])[MAIN] for image in pixels])
    same = torch.equal(first, again)
    yield Finding(
        "features twice", "ok" if same else "wrong", "the same bits" if same else "two passes over the same images differ"
    )
    error = float((first - alone).norm() / first.norm())
    yield Finding("features, batch 1 against 4", "ok" if error < RELATIVE else "wrong", f"relative difference {error:.1e}")


def findings(device: str, model: str, quick: bool) -> Iterator[Finding]:
    """All checks in turn; one that fails itself is a finding."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", check_packages),
        ("torchvision", check_torchvision),
        ("scipy", check_scipy),
        ("torchmetrics", check_torchmetrics),
        ("resize", check_pillow),
        ("device", lambda: check_machine(device)),
        ("cache", check_cache),
        ("weights", check_weights),
    ]
    if not quick:
        checks += [("generation", lambda: check_generation(device, model)), ("features", lambda: check_features(device))]
    for name, check in checks:
        try:
            yield from check()
        except InputError as error:
            yield Finding(name, "wrong", str(error))
        except Exception as error:  # whatever it is, it is what the user wants to know
            yield Finding(name, "wrong", f"{type(error).__name__}: {error}")


def run_doctor(device: str = "cpu", model: str = "builtin/cifar10", quick: bool = False, as_json: bool = False) -> int:
    """Print all findings; 1 if something is wrong, else 0."""
    found = []
    for finding in findings(device, model, quick):
        found.append(finding)
        if not as_json:
            print(f"{finding.status:<6} {finding.check}: {finding.text}", flush=True)
    wrong = sum(finding.status == "wrong" for finding in found)
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print(f"\n{wrong} wrong" if wrong else "\nnothing is wrong")
    return int(wrong > 0)
