"""Fixtures: stand-ins for the pipeline, the extractor and the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import Sample
from genkit_eval.metrics.moments import moments_of
from genkit_eval.references import Reference
from genkit_eval.report import plots
from genkit_eval.report.grid import png_bytes
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.eval.standins import FakePipeline, Runner, tiny_features


@pytest.fixture
def pipe() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="session")
def extractor() -> Extractor:
    return Extractor("fake/projection", "TINY", "e" * 64, "none", tiny_features, variant="tiny")


@pytest.fixture(scope="session")
def reference_features() -> Tensor:
    pixels = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return tiny_features(pixels)


@pytest.fixture(scope="session")
def reference(reference_features: Tensor) -> Reference:
    sample = Sample(reference_features, moments=moments_of(reference_features))
    return Reference(sample, "fake/reference", "a" * 64, 60, "random noise")


@pytest.fixture
def reference_file(tmp_path: Path, reference_features: Tensor, extractor: Extractor) -> Path:
    moments = moments_of(reference_features)
    tensors = {"mean": moments.mean, "cov": moments.cov, "features": reference_features.half()}
    metadata = {"num_images": "60", "extractor": extractor.name, "extractor_sha256": extractor.sha256, "dataset": "random noise"}
    path = tmp_path / "reference.safetensors"
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def runner(extractor: Extractor, reference: Reference, tmp_path: Path) -> Runner:
    return Runner(extractor, reference, tmp_path / "run")


@pytest.fixture
def plain_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing: it takes most of the time of a tiny run, and one test of the report looks at real plots."""
    for name in ("against", "traces"):
        monkeypatch.setattr(plots, name, lambda *args: png_bytes(Image.new("RGB", (2, 2))))
