"""What the documents say can be done, done: their Python runs, their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def python_of(page: str) -> str:
    """All Python blocks of a page as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def run(program: str, folder: Path) -> None:
    """Run a program in a fresh interpreter (what it registers stays there), in ``folder``."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "eval"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_example_runs(tmp_path: Path) -> None:
    run(python_of("README.md"), tmp_path)
    assert (tmp_path / "cat.png").stat().st_size > 0


def test_autoregressive_examples_run(tmp_path: Path) -> None:
    run(python_of("docs/autoregressive.md") + "\nassert fast.speculation.mean_length >= 1, fast.speculation", tmp_path)
    assert (tmp_path / "horse.png").stat().st_size > 0


def test_evaluation_example_runs(tmp_path: Path) -> None:
    run(python_of("docs/evaluation.md") + "\nassert 0.5 < metric.compute() <= 1", tmp_path)


def test_attention_examples_run(tmp_path: Path) -> None:
    run(python_of("docs/attention.md") + "\nassert (out - exact).abs().max() < 1e-5", tmp_path)


def test_contributing_examples_are_found_under_their_names(tmp_path: Path) -> None:
    check = """
import genkit
guidance = genkit.parse("Interval(SignCFG(1.1), 0.28, 5.42)")
assert genkit.parse(repr(guidance)) == guidance
out = genkit.load("builtin/cifar10")(classes=[3], seeds=[0], guidance=guidance, sampler="midpoint", steps=6)
assert out.latents.isfinite().all() and 12 < out.nfe[0] < 24, out.nfe
"""
    run(python_of("docs/write-a-guidance.md") + "\n" + python_of("CONTRIBUTING.md") + check, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to {missing}"
