"""The pipeline of a class-conditional pixel diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from genkit import noise
from genkit.denoiser import Denoiser, Guided, TraceLevel
from genkit.guidance import Guidance, Trace
from genkit.guidance.base import Result, StepInfo
from genkit.pipelines.compiling import Compiling
from genkit.pipelines.output import Output
from genkit.pipelines.request import as_guidance, batches, class_index, paired
from genkit.random import Gaussian
from genkit.samplers.diffusion import Sampler, find_sampler, sample, start
from genkit.samplers.diffusion.loop import Callback, points


@dataclass
class ClassPipeline(Compiling):
    """Class labels in, images out: ``pipe(classes=[3, "ship"], seeds=[0, 1], guidance=Interval(CFG(3.0), 0.28, 5.42))``.

    Attributes:
        models: denoisers by name; ``"main"``, and ``"weak"`` where an early snapshot was shipped. ``"minority"`` is no denoiser
            but the classifier of minority levels, where there is one.
        class_names: names of the classes 0 .. C - 1. Label C is the dropped label, the unconditional branch.
        image_shape: (channels, height, width).
        sigma_min, sigma_max: noise levels the model was trained for.
        fingerprint: SHA-256 over the files of all models.
    """

    models: dict[str, Denoiser]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str
    name: str
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: str | torch.device) -> ClassPipeline:
        """Move the networks; returns the pipeline."""
        self.device = torch.device(device)
        for model in self.models.values():
            if isinstance(model, torch.nn.Module):
                model.to(self.device)
        return self

    def _compilable(self) -> list[Any]:
        denoisers = [model for model in self.models.values() if hasattr(model, "path")]
        return [getattr(denoiser, "network", denoiser) for denoiser in denoisers]

    def __call__(
        self,
        classes: int | str | Sequence[int | str],
        seeds: int | Sequence[int] | None = None,
        guidance: Guidance | str | float | None = None,
        *,
        sampler: str | Sampler = "heun",
        steps: int = 18,
        grid: str | Tensor | Sequence[float] | None = None,
        batch_size: int | None = None,
        trace: TraceLevel = "basic",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Output:
        """Generate one image per class.

        Image k depends on its class, its seed, the guidance and the sampler; not on the batch it is made in.

        Args:
            classes: index or name, or a list of them.
            seeds: one integer per class; None is 0, 1, 2, ... A single class (not a list) goes with every seed, a single seed
                with every class.
            guidance: object, expression, a number w (short for CFG(w)), or None for none.
            sampler: name or expression, for example ``"heun(churn=40)"``.
            steps: number of steps, 1 to 10000; not used when ``grid`` gives the levels themselves.
            grid: name of a grid of noise levels (karras, edm, exponential, uniform_t), or the levels themselves,
                (steps + 1,) falling; None is the sampler's own.
            batch_size: at most this many images at a time; None is all at once.
            trace: ``"none"``, ``"basic"``, or ``"full"`` (also the branches' cosine and the update's norm).
            progress: show a progress bar on stderr.
            callback: called with (StepInfo, Result) after the first evaluation of every step.

        Raises:
            ValueError: an unknown class, seeds that do not match the classes, an unknown sampler, guidance or grid.
        """
        labels, seed_list = paired(classes, seeds, self.class_index)
        rule, solver = as_guidance(guidance), find_sampler(sampler)
        solver.check(rule)
        sigmas = self._grid(solver, steps, grid)
        chunks = [(labels[part], seed_list[part]) for part in batches(len(labels), batch_size)]
        latents, nfe, calls, table = [], list[int](), 0, Trace()
        with tqdm(total=len(chunks) * (len(sigmas) - 1), disable=not progress, unit="step", leave=False) as bar:

            def tick(info: StepInfo, result: Result) -> None:
                bar.update()
                if callback is not None:
                    callback(info, result)

            for some_labels, some_seeds in chunks:
                run = self._run(rule, some_labels, some_seeds, trace)
                latents.append(self._sample(run, some_seeds, solver, sigmas, tick if progress or callback else None))
                nfe.extend(run.ledger.nfe)
                calls += run.ledger.calls
                table.extend(run.trace)
        return Output(torch.cat(latents), nfe, calls, table, seed_list, labels)

    def _run(self, guidance: Guidance, labels: list[int], seeds: list[int], trace: TraceLevel) -> Guided:
        cond = torch.tensor(labels, device=self.device)
        conditions = {"cond": cond, "uncond": torch.full_like(cond, self.num_classes)}
        return Guided(self.models, guidance, conditions, len(labels), trace, seeds)

    @torch.no_grad()
    def _sample(self, run: Guided, seeds: list[int], solver: Sampler, sigmas: Tensor, callback: Callback | None) -> Tensor:
        path = solver.path or self.models["main"].path
        like = torch.empty(len(seeds), *self.image_shape, device=self.device)
        x = start(Gaussian(seeds, stream=0)(like), sigmas, path)
        return sample(run, x, sigmas, solver, path, Gaussian(seeds, stream=1), callback)

    def _grid(self, solver: Sampler, steps: int, grid: str | Tensor | Sequence[float] | None) -> Tensor:
        if grid is not None and not isinstance(grid, str):
            try:
                levels = torch.as_tensor(grid, dtype=torch.float64)
                points(levels, solver.path or self.models["main"].path)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"grid={grid!r} must be falling noise levels, or one of {', '.join(noise.GRIDS)} ({error})"
                ) from None
            return levels
        if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= 10_000:
            raise ValueError(f"steps={steps!r}: use an integer from 1 to 10000")
        name = solver.grid if grid is None else grid
        if name not in noise.GRIDS:
            raise ValueError(f"grid={grid!r} is unknown; use one of {', '.join(noise.GRIDS)}, or falling noise levels")
        return noise.GRIDS[name](int(steps), self.sigma_min, self.sigma_max)

    def class_index(self, value: int | str) -> int:
        """Index of a class given by index or name. Raises ValueError naming what would work."""
        return class_index(value, self.num_classes, self.class_names, self.name)


__all__ = ["ClassPipeline", "as_guidance"]
