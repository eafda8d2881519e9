"""Exact denoisers and small run helpers shared by the tests: nothing here is trained, everything is float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Condition, Denoiser, Guided
from genkit.guidance import Guidance, StepInfo
from genkit.guidance.base import Perturbation
from genkit.noise import VE, Path
from genkit.random import Gaussian
from genkit.samplers.diffusion import SAMPLERS, Sampler, find_sampler, sample
from genkit.samplers.diffusion.loop import OFFERED

GOLDEN = File(__file__).parent / "golden"
UNCONDITIONAL = -1  # the label that stands for "no class"
CHANGED = -2  # what is noted for an embedding that stands for no label


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of ``tests/golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


class Mixture:
    """The exact denoiser of ``x0 ~ sum_k w_k(y) N(mu_k, cov_k)``, over images of any shape (flattened inside).

    ``D = sum_k r_k [mu_k + cov_k T_k^-1 (x - mu_k)]``, ``T_k = cov_k + sigma^2 I``, ``r_k ~ w_k(y) N(x; mu_k, T_k)``.
    The condition is a tensor of labels, or a mapping that has one under "label"; label -1 is the mixture over all classes.
    Its embedding is the weight of each component, in place of the label. ``extra`` widens every component: a worse model of the
    same data, as a perturbed one is.
    """

    def __init__(self, mean: Tensor, cov: Tensor, weight: Tensor, prior: Tensor, path: Path = VE, extra: float = 0.0) -> None:
        eye = torch.eye(mean.shape[1], dtype=torch.float64)
        self.mean, self.path = mean, path
        self.values, self.vectors = torch.linalg.eigh(cov + extra**2 * eye)
        self.log_weight = torch.cat([weight, (prior @ weight)[None]]).log()  # the last row, also reached as -1: no class
        self.widened = 0.0

    @classmethod
    def from_golden(cls, arrays: Mapping[str, np.ndarray], extra: float = 0.0) -> Mixture:
        keys = ("gmm_mu", "gmm_cov", "gmm_weight_given_class", "gmm_class_prior")
        mean, cov, weight, prior = (torch.from_numpy(arrays[key]) for key in keys)
        return cls(mean, cov, weight, prior, extra=extra)

    @classmethod
    def random(cls, dim: int, classes: int = 3, path: Path = VE, extra: float = 0.0) -> Mixture:
        """A fixed mixture of two components a class, with values of about unit size."""
        g = torch.Generator().manual_seed(dim)
        k = 2 * classes
        mean = 1.5 * torch.randn(k, dim, generator=g, dtype=torch.float64)
        root = torch.randn(k, dim, dim, generator=g, dtype=torch.float64) / (2 * dim**0.5)
        weight = torch.rand(classes, k, generator=g, dtype=torch.float64) ** 3 + 0.02
        weight = weight / weight.sum(1, keepdim=True)
        return cls(mean, root @ root.mT, weight, torch.full((classes,), 1 / classes, dtype=torch.float64), path, extra)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        label = condition["label"] if isinstance(condition, Mapping) else condition
        flat = x.double().flatten(1)
        if self.path is not VE:
            flat = flat / torch.tensor([self.path(float(s))[0] for s in sigma], dtype=torch.float64)[:, None]
        flat = flat[:, None] - self.mean
        rotated = torch.einsum("kij,bki->bkj", self.vectors, flat)
        values = self.values + self.widened
        total = values + sigma.double()[:, None, None].square()
        log_weight = label.clamp_min(1e-9).log() if label.is_floating_point() else self.log_weight[label]
        log_r = log_weight - (rotated.square() / total + total.log()).sum(-1) / 2
        part = self.mean + torch.einsum("kij,bkj->bki", self.vectors, rotated * values / total)
        return torch.einsum("bk,bki->bi", log_r.softmax(1), part).reshape(x.shape).to(x.dtype)

    def embed(self, condition: Condition) -> Condition:
        """Weights of the components in place of labels."""
        if isinstance(condition, Mapping):
            return {**condition, "label": self.embed(condition["label"])}
        return condition if condition.is_floating_point() else self.log_weight[condition].exp()

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        """Wider components, how much depends on the kind."""
        self.widened = {"identity": 0.3, "blur": 0.2, "skip": 0.4}[perturbation.kind]
        try:
            yield
        finally:
            self.widened = 0.0


class Classifier:
    """``log p(label | x)`` (B,) of the exact mixture, classes being equally probable."""

    def __init__(self, inner: Mixture) -> None:
        self.inner, self.path = inner, inner.path

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        label = condition["label"] if isinstance(condition, Mapping) else condition
        flat = x.double().flatten(1)[:, None] - self.inner.mean
        total = self.inner.values + sigma.double()[:, None, None].square()
        rotated = torch.einsum("kij,bki->bkj", self.inner.vectors, flat)
        log_density = -(rotated.square() / total + total.log()).sum(-1) / 2
        log_joint = torch.logsumexp(log_density[:, None] + self.inner.log_weight[:-1], dim=-1)
        return log_joint.log_softmax(1).gather(1, label[:, None])[:, 0].to(x.dtype)


class Counting:
    """A denoiser that books every call: how many rows, at which sigma, and which sample and label each row belongs to.

    ``log`` may be shared by several models: the labels of their calls, in the order of the calls.
    """

    def __init__(self, inner: Denoiser, log: list[list[int]] | None = None) -> None:
        self.inner, self.path = inner, inner.path
        self.log: list[list[int]] = [] if log is None else log
        self.sigmas: list[Tensor] = []
        self.ids: list[list[int]] = []
        self.labels: list[list[int]] = []
        self.outputs: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        assert len(x) == len(sigma) == len(condition["label"]) == len(condition["id"])
        self.sigmas.append(sigma)
        self.ids.append(condition["id"].tolist())
        self.labels.append(self.names(condition["label"]))
        self.log.append(self.labels[-1])
        self.outputs.append(self.inner(x, sigma, condition))
        return self.outputs[-1]

    def names(self, label: Tensor) -> list[int]:
        if not label.is_floating_point():
            return label.tolist()
        none = self.embed(torch.tensor(UNCONDITIONAL))
        return [UNCONDITIONAL if torch.equal(row, none) else CHANGED for row in label]

    def embed(self, condition: Condition) -> Condition:
        return self.inner.embed(condition)  # type: ignore[attr-defined]

    @contextmanager
    def perturbed(self, perturbation: Perturbation) -> Iterator[None]:
        with self.inner.perturbed(perturbation):  # type: ignore[attr-defined]
            yield

    def rows(self, batch: int) -> list[int]:
        """Rows evaluated for each sample."""
        return np.bincount([i for ids in self.ids for i in ids], minlength=batch).tolist()


SHAPE = (2, 2, 1)  # few values: in many dimensions the branches of an exact model soon agree
MAIN, WEAK = Mixture.random(4), Mixture.random(4, extra=0.5)
OTHERS = {"classifier": Classifier(MAIN), "minority": Classifier(WEAK)}  # what is not a denoiser
LABELS = torch.tensor([0, 1, 2, 0])


def conditions(label: Tensor, first_id: int = 0) -> dict[str, dict[str, Tensor]]:
    """What a guidance may ask for: the class, no class, and another class."""
    ids = torch.arange(first_id, first_id + len(label))
    labels = {"cond": label, "uncond": torch.full_like(label, UNCONDITIONAL), "negative": (label + 1) % 3}
    return {name: {"label": value, "id": ids} for name, value in labels.items()}


class Run:
    """One toy run of a guidance from start to end: 6 Heun steps from sigma 3 over 4 samples of shape (2, 2, 1) unless told."""

    def __init__(
        self,
        guidance: Guidance,
        sampler: str | Sampler = "heun",
        rows: tuple[int, ...] = (0, 1, 2, 3),
        steps: int = 6,
        path: Path = VE,
        trace: Any = "basic",
    ) -> None:
        index, solver = list(rows), suitable(sampler, guidance)
        self.log: list[list[int]] = []
        self.main, self.weak = Counting(MAIN, self.log), Counting(WEAK, self.log)
        models = {"main": self.main, "weak": self.weak, **OTHERS}
        self.guided = Guided(models, guidance, conditions(LABELS[index]), len(rows), trace=trace, seeds=index)
        sigmas = noise.karras(steps, 0.05, 3.0)
        start = Gaussian(index)(torch.empty(len(rows), *SHAPE, dtype=torch.float64)) * path(3.0)[1]
        self.out = sample(self.guided, start, sigmas, solver, path, noise=Gaussian(index, stream=1))

    @property
    def nfe(self) -> list[int]:
        return self.guided.ledger.nfe


def suitable(sampler: str | Sampler, guidance: Guidance) -> Sampler:
    """The sampler, or the first one that offers what the guidance needs of it."""
    wanted = guidance.needs & OFFERED
    return next(s for s in (find_sampler(sampler), *SAMPLERS.values()) if wanted <= s.offers)


@lru_cache(maxsize=256)
def reference(guidance: Guidance, sampler: str = "heun", path: Path = VE) -> Run:
    """A run on the default rows, made once: read it only."""
    return Run(guidance, sampler, path=path)


def with_parts(guidance: Guidance, change: Callable[[Guidance], Guidance]) -> Guidance:
    """The same guidance with every guidance in its fields changed."""
    changes: dict[str, Any] = {}
    for field in fields(guidance):
        value = getattr(guidance, field.name)
        if isinstance(value, Guidance):
            changes[field.name] = change(value)
        elif isinstance(value, tuple) and any(isinstance(v, Guidance) for v in value):
            changes[field.name] = tuple(change(v) if isinstance(v, Guidance) else v for v in value)
    return replace(guidance, **changes) if changes else guidance


def at_scale(guidance: Guidance, scale: float) -> Guidance:
    """The same guidance with every ``scale`` in it replaced."""
    made = with_parts(guidance, lambda part: at_scale(part, scale))
    if "scales" in [f.name for f in fields(made)]:  # one for each frequency band
        made = replace(made, scales=(scale,) * len(made.scales))  # type: ignore[attr-defined, call-arg]
    return replace(made, scale=scale) if "scale" in [f.name for f in fields(made)] else made


def step_info(x: Tensor, index: int = 0, total: int = 1, sigma: float = 1.0, path: Path = VE, **changes: Any) -> StepInfo:
    """The first evaluation of a step, at ``x``."""
    alpha, s = path(sigma)
    progress = index / (total - 1) if total > 1 else 0.0
    return StepInfo(index, total, progress, "step", sigma, 0.5 * sigma, alpha, s, x)._replace(**changes)
