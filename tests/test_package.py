"""The house rules that hold for every source file: floors, what an import loads, file length, safe reading of weights."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A place may import from itself and from every lower floor, never from a neighbour on its own floor.
FLOORS = {
    "genkit.files": 1,
    "genkit.noise": 1,
    "genkit.random": 1,
    "genkit.weights": 1,
    "genkit.guidance": 2,
    "genkit.attention": 2,
    "genkit.models": 3,
    "genkit.tokenizers": 3,
    "genkit.denoiser": 3,
    "genkit.samplers": 4,
    "genkit.pipelines": 5,
    "genkit.training": 6,  # above the pipelines: a recipe ends by writing what they load
    "genkit": 7,  # the public namespace: genkit/__init__.py alone
    "genkit_eval": 8,
    "genkit_apps": 8,
}
# What does not load beside the CPU build of torch, or brings in something that does not.
BANNED = {"torchvision", "timm", "torch_fidelity", "cleanfid", "lpips"}
LONGEST_FILE = 400


def source_files() -> dict[str, Path]:
    """Every source file under its dotted module name."""
    found = {}
    for folder in ("genkit", "eval/genkit_eval", "apps/genkit_apps"):
        top = ROOT / folder
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = source_files()


def place_of(module: str) -> str | None:
    """The row of FLOORS that a module belongs to; None for a module that is not ours or that nobody has put on a floor."""
    if module == "genkit":
        return module
    depth = 2 if module.startswith("genkit.") else 1
    place = ".".join(module.split(".")[:depth])
    return place if place in FLOORS else None


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names of the modules that ``source`` imports, at any depth and in any of the ways to write it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*parents, base] if base else parents)
            # ``from genkit import noise`` imports a module, ``from genkit import load`` a name of the public namespace
            full = [f"{base}.{alias.name}" for alias in node.names]
            yield from dict.fromkeys(name if base == "genkit" and place_of(name) else base for name in full)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


#: Looks upwards, when they are called: ``guidance.to_diffusers()``, a method for users' convenience, and the command that
#: measures attention, which measures images too.
EXCEPTIONS = {
    ("genkit.guidance.base", "genkit.pipelines.to_diffusers"),
    ("genkit.attention.deviation", "genkit.pipelines.deviation"),
}


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Those imports of a file that lead to its own floor's neighbours or further up."""
    here = place_of(module)
    assert here is not None, f"{module} stands on no floor: add its place to FLOORS"
    targets = {name: place_of(name) for name in imports(source, module, is_package) if (module, name) not in EXCEPTIONS}
    return [name for name, place in targets.items() if place and place != here and FLOORS[place] >= FLOORS[here]]


def unsafe_loads(source: str) -> list[int]:
    """Line numbers of ``torch.load`` calls without ``weights_only=True``."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    return [n.lineno for n in calls if not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in n.keywords)]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", SOURCES)
def test_file_keeps_the_house_rules(module: str) -> None:
    path = SOURCES[module]
    source = path.read_text(encoding="utf-8")
    upward = upward_imports(source, module, is_package=path.name == "__init__.py")
    assert not upward, f"{module} (floor {FLOORS[place_of(module) or '']}) imports {upward}: only its own place and lower floors"
    banned = {name.partition(".")[0] for name in imports(source, module)} & BANNED
    assert not banned, f"{module} imports {banned}"
    assert not unsafe_loads(source), f"{module}: torch.load without weights_only=True in lines {unsafe_loads(source)}"
    lines = source.count("\n")
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines: does it hold two ideas?"


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import genkit.samplers.diffusion", "genkit.guidance.cfg", ["genkit.samplers.diffusion"]),
        ("def f():\n    from genkit.pipelines import load", "genkit.models.unet", ["genkit.pipelines"]),
        ("from genkit import samplers", "genkit.noise", ["genkit.samplers"]),
        ("from genkit import load", "genkit.training.recipe", ["genkit"]),
        ("import genkit_eval.metrics", "genkit.samplers.diffusion.heun", ["genkit_eval.metrics"]),
        ("from genkit.noise import to_eps", "genkit.random", ["genkit.noise"]),
        ("from ...samplers import SAMPLERS", "genkit.guidance.deep.cfg", ["genkit.samplers"]),
        ("import importlib\nimportlib.import_module('genkit.pipelines')", "genkit.denoiser", ["genkit.pipelines"]),
        ("from genkit.noise import to_eps\nfrom .trace import Trace\nimport torch", "genkit.guidance.cfg", []),
        ("import genkit\nfrom genkit import load, noise", "genkit_eval.run", []),
    ],
)
def test_floor_check_tells_up_from_down(source: str, module: str, found: list[str]) -> None:
    assert upward_imports(source, module) == found


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imports("from .heun import step\nfrom ..models import UNet", "genkit.samplers", is_package=True)) == [
        "genkit.samplers.heun",
        "genkit.models",
    ]


def test_floor_check_refuses_a_place_without_a_floor() -> None:
    with pytest.raises(AssertionError, match=r"genkit\.new_place\.file stands on no floor"):
        upward_imports("", "genkit.new_place.file")


def test_documented_floors_are_the_tested_ones() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \|", page, re.MULTILINE)
    names = {re.sub(r"^(eval|apps)/|/$|\.py$|/__init__\.py$", "", place).replace("/", "."): int(floor) for floor, place in rows}
    present = {place for module in SOURCES if (place := place_of(module))}
    assert names == {place: floor for place, floor in FLOORS.items() if place in present}


def test_load_check_finds_pickle_loading() -> None:
    source = (
        "import torch\ntorch.load(p)\ntorch.load(p, weights_only=False)\ntorch.load(p, map_location='cpu', weights_only=True)"
    )
    assert unsafe_loads(source) == [2, 3]


def test_import_genkit_loads_nothing_heavy() -> None:
    heavy = {
        "torch",
        "accelerate",
        "diffusers",
        "gradio",
        "huggingface_hub",
        "matplotlib",
        "scipy",
        "torchmetrics",
        "transformers",
    }
    assert not loaded_by("import genkit") & heavy


def test_command_line_starts_without_torch() -> None:
    assert not loaded_by("import genkit_eval.cli") & {"torch", "matplotlib", "torchmetrics", "scipy"}


def test_requirements_leave_out_what_breaks_the_cpu_build() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = json.dumps([project["dependencies"], project["optional-dependencies"]])
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not [name for name in BANNED if name in (named + pinned).lower().replace("-", "_")]
    assert "torchmetrics[" not in named, "its image extra needs torchvision"


def test_lock_pins_torch_for_every_build() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in pins, "a local version such as +cpu would refuse the other builds"
    assert not [pin for pin in pins if pin.startswith(("nvidia-", "cuda-", "triton==", "xformers=="))]
    assert not [pin for pin in pins if "://" in pin or " @ " in pin or pin.startswith("-")]


def test_packages_are_marked_as_typed() -> None:
    assert (ROOT / "genkit/py.typed").exists()
    assert (ROOT / "eval/genkit_eval/py.typed").exists()
