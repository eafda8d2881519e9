"""A tiny pipeline and features, so that runs take milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from genkit_eval.extractors import Extractor
from genkit_eval.references import Reference
from genkit_eval.run import Request, make_config, run
from genkit_eval.score import Bootstrap
from torch import Tensor

from genkit.guidance import parse
from genkit.guidance.base import Guidance

WIDTH = 5
WEIGHTS = torch.randn(3 * 8 * 8, WIDTH, generator=torch.Generator().manual_seed(99))


@dataclass
class FakePipeline:
    """Image k from seed, class and guidance; ``stop_after`` calls it raises what an interrupted or failing run would."""

    name: str = "fake/tiny"
    fingerprint: str = "f" * 64
    class_names: tuple[str, ...] = ("cat", "dog", "ship")
    image_shape: tuple[int, int, int] = (3, 8, 8)
    stop_after: int | None = None
    error: BaseException = field(default_factory=KeyboardInterrupt)
    asked: list[tuple[Any, int, int]] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __call__(
        self, classes: Sequence[int | str], seeds: Sequence[int], guidance: Any, *, sampler: str, steps: int, trace: Any
    ) -> Any:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise self.error
        self.asked.extend((guidance, seed, int(label)) for seed, label in zip(seeds, classes, strict=True))
        pixels = torch.stack([self._image(seed, int(label), repr(guidance)) for seed, label in zip(seeds, classes, strict=True)])
        rows = [
            {
                "step": i,
                "stage": "step",
                "sigma": 80.0 / 4**i,
                "weight": 3.0,
                "branches": "cond",
                "rows": len(seeds),
                "cosine": 0.5,
            }
            for i in range(steps)
        ]
        rows[-1]["cosine"] = float("nan")
        nfe = [steps + seed % 2 for seed in seeds]
        return SimpleNamespace(pixels=pixels, nfe=nfe, calls=steps, trace=SimpleNamespace(rows=rows))

    def _image(self, seed: int, label: int, guidance: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 7919 + label)
        spread = 40 + 10 * (len(guidance) % 5)
        return (torch.randn(self.image_shape, generator=generator) * spread + 100 + 20 * label).clamp(0, 255).to(torch.uint8)


def tiny_features(pixels: Tensor) -> Tensor:
    """A fixed random projection: features of an image do not depend on its batch."""
    return torch.stack([(image.float().flatten() / 255) @ WEIGHTS for image in pixels])


@dataclass
class Runner:
    """Runs on the tiny stand-ins."""

    extractor: Extractor
    reference: Reference
    out: Path

    def request(self, *texts: str, n: int = 25, **more: Any) -> Request:
        pairs: tuple[tuple[str, Guidance], ...] = tuple((text, parse(text)) for text in texts)
        return Request(pairs, n, more.pop("out", self.out), Bootstrap(20), progress=False, **more)

    def __call__(self, pipe: FakePipeline, *texts: str, n: int = 25, steps: int = 3, **more: Any) -> dict[str, Any]:
        config = make_config(pipe, self.extractor, "heun", steps, 0, "balanced", 10)
        return run(pipe, self.extractor, self.reference, config, self.request(*texts, n=n, **more))
