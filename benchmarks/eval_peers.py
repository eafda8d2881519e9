"""The evaluators that genkit-eval is compared with, in a virtual environment of their own, for eval_parity.py and eval_speed.py.

``environment`` makes it, and ``Peers.ask`` runs this file in it, where genkit is not installed: a job by name, its arguments as
JSON, and the answer as the last line of the output. torch, numpy and Pillow are of the versions that genkit runs with, so that
convolutions and decoders are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PEERS = ("torch-fidelity", "pytorch-fid", "clean-fid")
# scipy 1.18 took sqrtm's argument disp= away, which pytorch-fid and clean-fid give.
BESIDE = ("torchvision", "scipy<1.18")
SAME = ("torch", "numpy", "pillow")
WIDTH, K, SIZE = 2048, 3, 299
BATCH = 32


# In genkit's Python


@dataclass(frozen=True)
class Peers:
    """The environment: its ``python``, the ``versions`` of what is in it, and the packages of PEERS that did not install."""

    python: str
    versions: dict[str, str]
    lacking: tuple[str, ...]

    def ask(self, job: str, home: Path | None = None, threads: int = 2, **arguments: Any) -> dict[str, Any]:
        """The answer to a job. ``home`` is where weights that would be fetched are found instead."""
        # Threads that wait do not count as seconds of CPU.
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **({} if home is None else {"TORCH_HOME": str(home)})}
        command = [self.python, "-I", __file__, job, json.dumps({"threads": threads, **arguments})]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def environment(folder: Path) -> Peers:
    """The environment in ``folder``, made if it is new or empty. SystemExit for a folder with anything else in it."""
    python, done = folder / "bin" / "python", folder / "peers.json"
    if not done.exists():
        if folder.exists() and any(folder.iterdir()):
            raise SystemExit(f"--venv: {folder} holds something else; a new or empty folder works")
        venv.create(folder, with_pip=True)
        same = [f"{name}=={version(name)}" for name in SAME]
        # Without the build's label (+cpu) where pip's index does not have that build.
        for wanted in (same, [text.partition("+")[0] for text in same]):
            if _install(python, *wanted, *BESIDE):
                break
        else:
            raise SystemExit("pip could not install torch and torchvision; see its messages above")
        for name in PEERS:
            _install(python, *wanted, *BESIDE, name)
        done.write_text("{}\n")
    versions = Peers(str(python), {}, ()).ask("versions")
    return Peers(str(python), versions, tuple(name for name in PEERS if name not in versions))


def _install(python: Path, *requirements: str) -> bool:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    return subprocess.run(command, stdout=sys.stderr).returncode == 0


# In both


def features(n: int, seed: int) -> Any:
    """Rectified (N, 2048) float32 with correlated columns and a mean squared length of 100, as Inception's."""
    import torch

    g = torch.Generator().manual_seed(seed)
    turn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    scale = torch.linspace(2, 0.05, WIDTH)
    x = torch.empty(n, WIDTH)
    for part in x.split(1024):  # no more memory than the result
        part.copy_((torch.randn(len(part), WIDTH, generator=g) * scale) @ turn + 0.02 * seed).relu_()
    return x.mul_((100 / (x.square().sum(dim=1).mean())) ** 0.5)


def pictures(n: int) -> Any:
    """uint8 (N, 3, 256, 256): smooth, so that no layer of a network sees noise alone."""
    import torch

    coarse = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 255
    return torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic").clamp_(0, 255).to(torch.uint8)


def peak() -> float:
    """Largest resident memory since it was last forgotten, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measured(run: Callable[[], Any]) -> dict[str, Any]:
    """Value, seconds and memory of ``run``; what it works on is made before, and memory is what is taken above it."""
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    value = run()
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "extra_mib": peak() - before}
    return {"value": value, **took}


# In the peers' Python


def _torchvision() -> None:
    """Declare the operators that torchvision registers fakes for, where its build does not fit the one of torch.

    A torchvision built for CUDA does not load its library beside a torch for CPU, and then fails to import. The peers use none of
    its operators. The library is kept, as what it declares goes with it.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401


_KEPT: list[Any] = []


def versions() -> dict[str, str]:
    """Of everything that takes part and is there."""
    found = {}
    for name in (*PEERS, *SAME, "torchvision", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def torch_fidelity(fake: str, real: str, weights: str, cache: str, kid: dict[str, list[int]]) -> dict[str, float]:
    """All metrics of Inception's features, and KID for each [subsets, size] of ``kid``, from one extraction."""
    from torch_fidelity import calculate_metrics

    inputs = {"input1": fake, "input2": real, "cache_root": cache, "input1_cache_name": "fake", "input2_cache_name": "real"}
    network = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": weights}
    # Default is another network for precision and recall.
    common = {**inputs, **network, "feature_layer_prc": "2048", "cuda": False, "verbose": False, "batch_size": BATCH}
    found = calculate_metrics(**common, isc=True, fid=True, prc=True)
    answer = {
        "FID": found["frechet_inception_distance"],
        "IS": found["inception_score_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    for name, (subsets, size) in kid.items():
        found = calculate_metrics(**common, kid=True, kid_subsets=subsets, kid_subset_size=size)
        answer[name] = found["kernel_inception_distance_mean"]
    return answer


def pytorch_fid(fake: str, real: str) -> dict[str, float]:
    """Its one number; TORCH_HOME holds the weights."""
    from pytorch_fid.fid_score import calculate_fid_given_paths

    return {"FID": float(calculate_fid_given_paths([fake, real], BATCH, "cpu", WIDTH, num_workers=0))}


def clean_fid(fake: str, real: str, scratch: str) -> dict[str, float]:
    """FID and KID by the rule "clean".

    Its network is a TorchScript file, made here of pytorch-fid's with the weights in TORCH_HOME. With up to 1000 images each of
    its KID's subsets is the whole set, so its unseeded draws do not matter.
    """
    import torch
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W
    from pytorch_fid.inception import fid_inception_v3
    from torch import nn

    net = fid_inception_v3().eval()
    net.fc = nn.Identity()  # what it returns are then the pooled features
    whole = nn.Module()
    whole.layers = torch.jit.trace(net, torch.zeros(2, 3, SIZE, SIZE))
    torch.jit.script(whole).save(str(Path(scratch) / "inception-2015-12-05.pt"))
    model = InceptionV3W(scratch, download=False)
    options = {"num_workers": 0, "batch_size": BATCH, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    generated, reference = (fid.get_folder_features(folder, model, **options) for folder in (fake, real))
    return {
        "FID": float(fid.fid_from_feats(generated, reference)),
        "KID": float(fid.kernel_distance(generated, reference, num_subsets=1)),
    }


def _sqrtm(n: int, weights: str) -> Callable[[], Any]:
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance

    sets = [features(n, seed).double().numpy() for seed in (1, 2)]
    (m1, s1), (m2, s2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in sets)
    del sets
    return lambda: float(calculate_frechet_distance(m1, s1, m2, s2))


def _neighbours(sparing: bool) -> Callable[[int, str], Callable[[], Any]]:
    def prepare(n: int, weights: str) -> Callable[[], Any]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        real, fake = features(n, 1), features(n, 2)
        return lambda: prc_features_to_metric(fake, real, prc_neighborhood=K, save_cpu_ram=sparing, verbose=False)

    return prepare


def _extraction(n: int, weights: str) -> Callable[[], Any]:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    pixels = pictures(n)

    def run() -> float:
        with torch.no_grad():
            return float(torch.cat([net(batch)[0] for batch in pixels.split(BATCH)]).double().square().mean())

    return run


#: What is timed: (images, weights file) to what runs.
KINDS: dict[str, Callable[[int, str], Callable[[], Any]]] = {
    "frechet, pytorch-fid (scipy sqrtm)": _sqrtm,
    "neighbours, torch-fidelity (2 metrics)": _neighbours(sparing=False),
    "neighbours, torch-fidelity save_cpu_ram (2 metrics)": _neighbours(sparing=True),
    "extraction, torch-fidelity": _extraction,
}


def measure(kind: str, n: int, weights: str) -> dict[str, Any]:
    """Time and memory of one of KINDS."""
    return measured(KINDS[kind](n, weights))


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "torch-fidelity": torch_fidelity,
    "pytorch-fid": pytorch_fid,
    "clean-fid": clean_fid,
    "measure": measure,
}


def main() -> None:
    job, arguments = sys.argv[1], json.loads(sys.argv[2])
    threads = arguments.pop("threads")
    if job == "versions":
        print(json.dumps(versions()))
        return
    import torch

    torch.set_num_threads(threads)
    with redirect_stdout(sys.stderr):
        _torchvision()
        answer = JOBS[job](**arguments)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
