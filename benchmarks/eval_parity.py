"""The same images through genkit-eval and through torch-fidelity, pytorch-fid and clean-fid, with the same weights.

    python benchmarks/eval_parity.py [--images PHOTOGRAPHS] [--venv DIR] [--threads 2] [--out docs/runs/eval_parity.json]

The peers run in a clean virtual environment that this script makes (``--venv`` keeps it for the next time). The network is the
Inception of 2015 with seeded random weights in the published layout, so nothing is downloaded but packages. Generated images are
altered photographs from PHOTOGRAPHS (a folder, zip or tar of 600 or more, all of one size), which are scored against others of
them as they are, and drawn ones of 32 and 400 pixels. For each peer genkit-eval is asked for the protocol that promises that
peer's rule. Exits with an error where two numbers differ by more than 1e-3 and nothing here says why.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eval_peers import Peers, environment
from genkit_eval.extractors.inception import SIZE, InceptionV3, fold
from genkit_eval.extractors.weights import sha256_of
from genkit_eval.images import open_images
from genkit_eval.metrics.kid import kid_subsets
from genkit_eval.references import read_contents
from PIL import Image, ImageEnhance
from record import save
from torch import Tensor, nn

TOLERANCE, SUBSETS, SEED = 1e-3, 20, 0
EXTRACTOR = "inception-2015"
#: Resize rule of genkit-eval that promises each peer's.
RULES = {"torch-fidelity": "tf1", "pytorch-fid": "torch-bilinear", "clean-fid": "clean"}
#: Metric of genkit-eval that promises the one a peer is asked for.
METRICS = {"FID": "frechet", "KID": "kid", "IS": "inception_score", "precision": "precision", "recall": "recall"}
#: Why numbers of a (peer, metric) may be apart by more than the tolerance.
EXPLAINED: dict[tuple[str, str], str] = {}


# Images


def altered(image: Image.Image) -> Image.Image:
    """What a poor generator might make of it: soft, and too colourful."""
    small = image.resize((image.width * 3 // 8, image.height * 3 // 8), Image.Resampling.BICUBIC)
    return ImageEnhance.Color(small.resize(image.size, Image.Resampling.BICUBIC)).enhance(1.5)


def photographs(uri: str, count: int, real: Path, fake: Path) -> None:
    """``count`` files as they are, and as many others altered. SystemExit for too few, and for sizes that differ."""
    source = open_images(uri).source
    if len(source.names) < 2 * count:
        raise SystemExit(f"--images: {len(source.names)} photographs; {2 * count} work, or --count {len(source.names) // 2}")
    sizes = set()
    for place, index in enumerate(np.random.RandomState(SEED).permutation(len(source.names))[: 2 * count].tolist()):
        data = source.read(index)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        sizes.add(image.size)
        if place >= count:
            altered(image).save(fake / f"{place:05d}.png")
        elif data.startswith(b"\xff\xd8"):  # one ending for all JPEGs: pytorch-fid knows .jpg and not .JPEG
            (real / f"{place:05d}.jpg").write_bytes(data)
        else:
            image.save(real / f"{place:05d}.png")
    if len(sizes) > 1:
        raise SystemExit(f"--images: sizes {', '.join(f'{w}x{h}' for w, h in sorted(sizes)[:3])}, ...; one size works")


def drawn(side: int, count: int, folder: Path, seed: int, roughness: float) -> None:
    """Clouds of ``side`` pixels with a tint of their own and grain."""
    g = torch.Generator().manual_seed(seed)
    for k in range(count):
        coarse = torch.randn(1, 3, 8, 8, generator=g)
        clouds = nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0]
        tint, contrast = torch.randn(3, 1, 1, generator=g), 30 + 40 * torch.rand(1, generator=g)
        x = 128 + contrast * clouds + 30 * tint + roughness * torch.randn(3, side, side, generator=g)
        Image.fromarray(x.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / f"{k:05d}.png")


# Weights


def random_state(seed: int) -> dict[str, Tensor]:
    """Seeded weights in the published layout. Shifts of the batch norms are wide: features else just grow with contrast."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        net = InceptionV3()
    state = {"fc.weight": torch.randn(net.fc.weight.shape, generator=g), "fc.bias": torch.zeros(net.fc.bias.shape)}
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            n = conv.out_channels
            state[f"{name}.conv.weight"] = torch.randn(conv.weight.shape, generator=g) * (2 / conv.weight[0].numel()) ** 0.5
            state[f"{name}.bn.weight"] = 1 + 0.1 * torch.randn(n, generator=g)
            state[f"{name}.bn.bias"] = torch.randn(n, generator=g)
            state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"] = torch.zeros(n), torch.ones(n)
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


def calibrated(state: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """``state`` with the batch norms' means and variances of ``pixels``, and logits that tell images apart.

    Without this activations grow or vanish with depth and all images get one class.
    """
    with torch.device("meta"):
        net = InceptionV3()
    net.load_state_dict(fold(state), assign=True)

    def normalise(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def before(conv: nn.Module, inputs: tuple[Tensor]) -> None:
            x = nn.functional.conv2d(inputs[0], state[f"{name}.conv.weight"], None, conv.stride, conv.padding)
            state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"] = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))
            folded = fold({key: value for key, value in state.items() if key.startswith(f"{name}.")})
            conv.weight, conv.bias = nn.Parameter(folded[f"{name}.weight"]), nn.Parameter(folded[f"{name}.bias"])

        return before

    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_pre_hook(normalise(name))
    with torch.no_grad():
        resized = nn.functional.interpolate(pixels.float(), (SIZE, SIZE), mode="bilinear")
        features = net((resized - 128) / 128)["features"]
        shared, weight = nn.functional.normalize(features.mean(dim=0), dim=0), state["fc.weight"]
        weight = weight - torch.outer(weight @ shared, shared)
        state["fc.weight"] = weight * (2 / (features @ weight.T).std(dim=0).mean())
    return state


def write_weights(path: Path, folders: list[Path], each: int = 8) -> None:
    """Weights calibrated on the first images of ``folders``."""
    found = [Image.open(file).convert("RGB") for folder in folders for file in sorted(folder.iterdir())[:each]]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in found])
    torch.save(calibrated(random_state(SEED), pixels), path)


# genkit-eval and the peers


@dataclass(frozen=True)
class Case:
    """Two folders of images, with the weights and a folder for what comes of them."""

    title: str
    folder: Path
    count: int
    threads: int

    @property
    def real(self) -> Path:
        return self.folder / "real"

    @property
    def fake(self) -> Path:
        return self.folder / "fake"

    @property
    def weights(self) -> Path:
        """Where pytorch-fid looks for its weights, below TORCH_HOME."""
        return self.folder / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"

    @property
    def subset(self) -> int:
        """Images in each of KID's subsets."""
        return self.count // 2

    def prepare(self, make: Callable[[Path, Path], None]) -> Case:
        """Make images and weights."""
        for folder in (self.real, self.fake, self.weights.parent):
            folder.mkdir(parents=True)
        make(self.real, self.fake)
        write_weights(self.weights, [self.real, self.fake])
        return self


def genkit(case: Case, *arguments: str | Path) -> None:
    """A command of genkit-eval. Features are made once for each set, network and rule."""
    more = {"GENKIT_CACHE": str(case.folder / "cache"), "OMP_NUM_THREADS": str(case.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "genkit_eval", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **more})


def ours(case: Case, peer: str) -> dict[str, tuple[float, str]]:
    """Value and protocol of each metric under the peer's resize rule."""
    rule = RULES[peer]
    network = ("--extractor", EXTRACTOR, "--weights", case.weights, "--any-weights", "--resize", rule)
    files = {kind: case.folder / f"{rule}-{kind}.safetensors" for kind in ("real", "fake")}
    for kind, file in files.items():
        genkit(case, "reference", "build", case.folder / kind, "--out", file, "--dataset", kind, *network)
    out = case.folder / f"score-{rule}"
    genkit(case, "score", case.fake, "--reference", files["real"], "--out", out, "--bootstrap", "0", *network)
    entry = json.loads((out / "results.json").read_text())["guidances"][0]["metrics"]
    found = {name: (entry[key]["value"], entry[key]["variant"]) for name, key in METRICS.items()}
    if peer == "torch-fidelity":
        # The metric kid_subsets, which takes 100 subsets of 1000, at the size of these sets.
        real, fake = (read_contents(files[kind]).layers["features"].features for kind in ("real", "fake"))
        value = kid_subsets(real, fake, SUBSETS, case.subset).mean
        found["KID of subsets"] = (value, f"kid/tf-subsets/{SUBSETS}x{case.subset}")
    return found


def theirs(case: Case, peer: str, peers: Peers) -> dict[str, float]:
    """Value of each metric that the peer has."""
    common = {"home": case.folder, "threads": case.threads, "fake": str(case.fake), "real": str(case.real)}
    if peer == "torch-fidelity":
        # One subset of all images is the estimate over all pairs.
        kid = {"KID": [1, case.count], "KID of subsets": [SUBSETS, case.subset]}
        return peers.ask(peer, **common, weights=str(case.weights), cache=str(case.folder / "fidelity"), kid=kid)
    return peers.ask(peer, **common, **({"scratch": str(case.folder)} if peer == "clean-fid" else {}))


def compare(case: Case, peers: Peers) -> list[dict[str, Any]]:
    """One row for each metric of each peer."""
    rows = []
    for peer in (peer for peer in RULES if peer not in peers.lacking):
        own = ours(case, peer)
        for metric, value in theirs(case, peer, peers).items():
            number, variant = own[metric]
            apart = abs(number - value) / max(abs(value), 1e-300)
            row = {"images": case.title, "peer": f"{peer} {peers.versions[peer]}", "metric": metric, "theirs": value}
            row |= {"ours": number, "protocol": variant, "relative_difference": apart}
            if apart > TOLERANCE and (peer, metric) in EXPLAINED:
                row["explained"] = EXPLAINED[peer, metric]
            rows.append(row)
            shown = f"{case.title:18s} {row['peer']:22s} {metric:15s} {value:15.8g} {number:15.8g} {apart:9.1e}  {variant}"
            print(shown, flush=True)
    return rows


def cases(args: argparse.Namespace, scratch: Path) -> list[Case]:
    """The sets of images, made, with weights calibrated on them."""
    found = []
    if args.images:
        case = Case("photographs", scratch / "photographs", args.count, args.threads)
        found.append(case.prepare(lambda real, fake: photographs(args.images, args.count, real, fake)))
    for side in args.sides:

        def make(real: Path, fake: Path, side: int = side) -> None:
            drawn(side, args.drawn, real, 1, roughness=5)
            drawn(side, args.drawn, fake, 2, roughness=15)

        found.append(Case(f"drawn, {side} pixels", scratch / f"drawn-{side}", args.drawn, args.threads).prepare(make))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", default="", help="photographs of one size: folder, zip or tar; default drawn images alone")
    parser.add_argument("--count", type=int, default=300, help="photographs in each set")
    parser.add_argument("--drawn", type=int, default=100, help="drawn images in each set")
    parser.add_argument("--sides", type=int, nargs="*", default=[32, 400], help="sides of the drawn images")
    parser.add_argument("--venv", type=Path, help="folder of the peers' environment, made if new; default a temporary one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        peers = environment(args.venv or scratch / "venv")
        sets = cases(args, scratch)
        rows = [row for case in sets for row in compare(case, peers)]
        weights = {case.title: sha256_of(case.weights) for case in sets}
    apart = [row for row in rows if row["relative_difference"] > TOLERANCE and "explained" not in row]
    if args.out:
        about = {"peers": peers.versions, "not_installed": list(peers.lacking), "weights": {"seed": SEED, "sha256": weights}}
        sizes = {"photographs": args.count if args.images else 0, "drawn": args.drawn, "tolerance": TOLERANCE}
        save(args.out, {**about, **sizes, "rows": rows})
    if apart:
        named = "; ".join(f"{row['peer']} {row['metric']} ({row['images']})" for row in apart)
        raise SystemExit(f"more than {TOLERANCE:g} apart: {named}")


if __name__ == "__main__":
    main()
