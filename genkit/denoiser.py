"""Networks as denoisers, and ``Guided``: plan, one packed forward pass, combine, account."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from genkit.attention.kernels import guidance_update, usable
from genkit.guidance.apg import APG
from genkit.guidance.base import Branch, Guidance, Perturbation, Result, Stage, StepInfo
from genkit.guidance.trace import Trace
from genkit.noise import VE, Path
from genkit.random import Keyed

Condition = Any
"""What a denoiser is conditioned on: None, a tensor (B, ...), or a mapping of such tensors."""

TraceLevel = Literal["none", "basic", "full"]
STAGES: tuple[str, ...] = get_args(Stage)
Network = tuple[str, Perturbation | None]  # the name of a model, and how it is weakened


class MissingCondition(ValueError):
    """A guidance asked for a branch that the run has no condition for."""


class Denoiser(Protocol):
    """``denoiser(x, sigma, condition) -> D``: the clean-image estimate at ``x`` (B, ...) with noise levels ``sigma`` (B,).

    ``x`` is in the coordinates of ``path``.
    """

    @property
    def path(self) -> Path: ...

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor: ...


class EDMDenoiser(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4, condition)`` (Karras et al. 2022, eq. 7 and table 1).

    Args:
        network: F, called with (c_in x, ln(sigma)/4, condition) in float32.
        sigma_data: standard deviation of the data, in units of the image.
    """

    path: Path = VE

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        s = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        total = s.square() + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, s * self.sigma_data * total.rsqrt(), total.rsqrt()
        f: Tensor = self.network((c_in * x).float(), sigma.float().log() / 4, condition)
        return c_skip * x + c_out * f.to(x.dtype)

    @property
    def num_classes(self) -> int | None:
        """Number of classes the network knows, if it says so."""
        return getattr(self.network, "num_classes", None)

    def embed(self, condition: Condition) -> Condition:
        """The condition as real numbers, where the network knows how; else the condition itself."""
        return self.network.embed(condition) if hasattr(self.network, "embed") else condition  # type: ignore[operator]

    def perturbed(self, perturbation: Perturbation) -> AbstractContextManager[None]:
        """Inside the returned context the network is weakened. Raises ValueError if it cannot be, or lacks the layers."""
        if not hasattr(self.network, "perturbed"):
            raise ValueError(f"{type(self.network).__name__} cannot be weakened in its layers: it has no method 'perturbed'")
        context: AbstractContextManager[None] = self.network.perturbed(perturbation)  # type: ignore[operator]
        return context


class Ledger:
    """Network evaluations of a run: ``calls`` (forward passes) and ``nfe`` (rows per sample, over all models)."""

    def __init__(self, batch: int) -> None:
        self.batch, self.calls, self._whole = batch, 0, 0
        self._partial: Tensor | None = None

    def count(self, branches: int, mask: Tensor | None = None) -> None:
        """Add ``branches`` rows to every sample, or one row to the samples of ``mask``."""
        if mask is None:
            self._whole += branches
        else:
            self._partial = mask.long() if self._partial is None else self._partial + mask.long()

    @property
    def nfe(self) -> list[int]:
        partial = [0] * self.batch if self._partial is None else self._partial.tolist()
        return [self._whole + p for p in partial]


class Guided:
    """One run of a guidance over a batch: the only holder of run state.

    Each call asks the guidance for its plan, evaluates exactly the planned rows (over branches and samples) in one forward
    pass per model, lets the guidance combine them, and books rows, calls and a trace row.

    Args:
        denoiser: a denoiser, or several models by name, of which ``"main"`` is required; what else a method asks for by name
            (a classifier, a distance) stands here too.
        guidance: any guidance object; it is not changed.
        conditions: the condition of each name a plan may ask for, each for the whole batch. ``"cond"`` is required.
        batch: number of samples.
        trace: ``"full"`` also measures cosine and update norm, ``"none"`` keeps no trace.
        seeds: one integer per sample, for methods that draw random numbers.
    """

    def __init__(
        self,
        denoiser: Denoiser | Mapping[str, Any],
        guidance: Guidance,
        conditions: Mapping[str, Condition],
        batch: int,
        trace: TraceLevel = "basic",
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.models: dict[str, Any] = dict(denoiser) if isinstance(denoiser, Mapping) else {"main": denoiser}
        if trace not in ("none", "basic", "full"):
            raise ValueError(f"trace={trace!r}: use 'none', 'basic' or 'full'")
        self.guidance, self.conditions, self.batch = guidance, dict(conditions), batch
        self.state = guidance.init(batch)
        self.ledger, self.trace, self.level = Ledger(batch), Trace(), trace
        self._packed: dict[tuple[Branch, ...], Condition] = {}
        self._keyed = None if seeds is None else Keyed(seeds)
        self._asked: tuple[Branch, ...] = ()
        self._reached = math.inf  # the level at which the last step ended
        self._visits: dict[int, int] = {}  # how many steps had an index
        self._prepares, self._refines = ("prepare" in guidance.needs), ("refine" in guidance.needs)

    def __call__(self, info: StepInfo) -> Result:
        self._asked = ()
        if info.stage == "step":
            self._begin(info)
        if self._prepares:
            self.state = self.guidance.prepare(info, self, self.state)
        branches = self.guidance.plan(info, self.state)
        predictions = self.evaluate(info, branches)
        result, self.state = self._combine(info, predictions)
        if self._refines:
            result, self.state = self.guidance.refine(info, result, self, self.state)
        if self.level != "none":
            self._record(info, predictions, result)
        return result

    def _combine(self, info: StepInfo, predictions: Mapping[str, Tensor]) -> tuple[Result, Any]:
        """``guidance.combine``; for APG, which is many passes over memory, by the fused programs of the device if it has them."""
        apg = self.guidance
        if type(apg) is APG and "uncond" in predictions and usable(*predictions.values()):
            options: dict[str, Any] = {"eta": apg.eta, "momentum": apg.momentum, "threshold": apg.threshold}
            cond, uncond = predictions["cond"], predictions["uncond"]
            denoised, average = guidance_update(cond, uncond, apg.weight(info), average=self.state, **options)
            return Result(denoised), average
        return self.guidance.combine(info, predictions, self.state)

    def _begin(self, info: StepInfo) -> None:
        """Forget the way down where the noise level has risen, as in a restart: what comes is another trajectory."""
        if info.sigma > self._reached * (1 + 1e-6):
            self.state = self.guidance.init(self.batch)
        self._reached = info.sigma_next
        if self._keyed is not None:  # only noise asks for it
            self._visits[info.index] = self._visits.get(info.index, 0) + 1

    def condition_on(self, conditions: Mapping[str, Condition]) -> None:
        """Go on with other conditions, for a host whose conditions change during a run."""
        self.conditions = dict(conditions)
        self._packed.clear()

    def evaluate(self, info: StepInfo, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        """Predictions of the planned branches, each (B, ...) in x0 space; one forward pass per model and perturbation."""
        if info.x.shape[0] != self.batch:
            raise ValueError(
                f"x has {info.x.shape[0]} rows, but this run is one of batch={self.batch}; make one Guided per batch"
            )
        if not branches:
            return {}
        network = branches[0].network
        if all(b.mask is None and b.network == network for b in branches):
            self._asked += branches
            return self._evaluate_whole(info, branches, network)
        masked = [b for b in branches if b.mask is not None]
        if masked and not any(b.name == "cond" and b.mask is None for b in branches):
            raise ValueError(
                f"the branch {masked[0].name!r} has a mask, whose other rows hold the cond prediction, but the plan evaluates "
                f"only {', '.join(b.name for b in branches)}: plan 'cond' without a mask beside it"
            )
        wanted = tuple(b for b in branches if b.mask is None or bool(b.mask.any()))
        self._asked += wanted
        out: dict[str, Tensor] = {}
        for network in dict.fromkeys(b.network for b in wanted):
            out.update(self._evaluate_rows(info, tuple(b for b in wanted if b.network == network), network))
        for b in masked:
            whole = out["cond"].clone()
            if b.name in out:
                whole[b.mask.to(whole.device)] = out[b.name]  # type: ignore[union-attr]
            out[b.name] = whole
        return out

    def noise(self, like: Tensor, info: StepInfo, draw: int = 0) -> Tensor:
        """Unit Gaussian noise (B, ...): a function of each sample's seed, the evaluation and ``draw`` alone."""
        if self._keyed is None:
            raise ValueError(f"seeds=None, but {self.guidance!r} draws random numbers: give one seed per sample")
        again = self._visits.get(info.index, 1) - 1  # a restart comes by an index more than once
        return self._keyed(like, info.index, STAGES.index(info.stage), draw, *((again,) if again > 0 else ()))

    def model(self, name: str) -> Any:
        """One of ``models``. Raises ValueError that names those there are."""
        if name not in self.models:
            raise ValueError(f"the guidance asks for the model {name!r}; this run has {', '.join(self.models)}")
        return self.models[name]

    def embed(self, condition: Condition, model: str = "main") -> Condition:
        """The condition as real numbers, where the model knows how (its ``embed``); else the condition itself."""
        embed = getattr(self.model(model), "embed", None)
        return condition if embed is None else embed(condition)

    def _evaluate_whole(self, info: StepInfo, branches: tuple[Branch, ...], network: Network) -> dict[str, Tensor]:
        k = len(branches)
        condition = self._packed.get(branches)
        if condition is None:
            condition = _join(self._conditions(info, branches))
            if not any(b.transform for b in branches):
                self._packed[branches] = condition
        denoised = self._forward(network, info, info.x if k == 1 else torch.cat([info.x] * k), condition)
        self.ledger.count(k)
        if k == 1:
            return {branches[0].name: denoised}
        # Slices: half the cost of split, which counts where the network is small.
        return {b.name: denoised[i * self.batch : (i + 1) * self.batch] for i, b in enumerate(branches)}

    def _evaluate_rows(self, info: StepInfo, branches: tuple[Branch, ...], network: Network) -> dict[str, Tensor]:
        x, conditions, sizes = [], [], []
        for b, condition in zip(branches, self._conditions(info, branches), strict=True):
            self.ledger.count(1, b.mask)
            x.append(info.x if b.mask is None else info.x[b.mask.to(info.x.device)])
            conditions.append(condition if b.mask is None else _rows(condition, b.mask))
            sizes.append(len(x[-1]))
        denoised = self._forward(network, info, torch.cat(x), _join(conditions))
        return {b.name: part for b, part in zip(branches, denoised.split(sizes), strict=True)}

    def _forward(self, network: Network, info: StepInfo, x: Tensor, condition: Condition) -> Tensor:
        name, perturbation = network
        net = self.model(name)
        sigma = info.s / info.alpha if info.alpha else math.inf
        alpha = net.path(sigma)[0]
        if not math.isclose(alpha, info.alpha, rel_tol=1e-12):  # the network lives on another path than the sampler
            x = x * (alpha / info.alpha)
        self.ledger.calls += 1
        if perturbation is None:
            return self._pass(net, x, sigma, condition)
        if not hasattr(net, "perturbed"):
            raise ValueError(f"{self.guidance!r} needs a network that can be weakened in its layers; {name!r} cannot be")
        with net.perturbed(perturbation):
            return self._pass(net, x, sigma, condition)

    def _pass(self, net: Any, x: Tensor, sigma: float, condition: Condition) -> Tensor:
        """One forward pass at one noise level; for hosts whose networks take it as a number."""
        denoised: Tensor = net(x, torch.full((x.shape[0],), sigma, dtype=torch.float64, device=x.device), condition)
        return denoised

    def _conditions(self, info: StepInfo, branches: tuple[Branch, ...]) -> list[Condition]:
        found = [self._condition(b.condition) for b in branches]
        if not any(b.transform for b in branches):
            return found
        changed = [c if b.transform is None else b.transform(c, info, self) for b, c in zip(branches, found, strict=True)]
        return [self.embed(c, b.model) for b, c in zip(branches, changed, strict=True)]

    def _condition(self, name: str) -> Condition:
        if name not in self.conditions:
            raise MissingCondition(
                f"the guidance asks for the {name!r} branch, which this model does not have (it has {', '.join(self.conditions)})"
            )
        return self.conditions[name]

    def _record(self, info: StepInfo, predictions: Mapping[str, Tensor], result: Result) -> None:
        asked, stats = self._asked, result.stats
        if self.level == "full":
            stats = {**stats, **_measure(info, asked, predictions, result)}
        self.trace.later(_row, info.index, info.stage, info.sigma, self.guidance.weight(info), asked, self.batch, stats)


def _row(
    step: int, stage: Stage, sigma: float, weight: float, asked: tuple[Branch, ...], batch: int, stats: Mapping[str, float]
) -> dict[str, Any]:
    rows = sum([batch if b.mask is None else int(b.mask.sum()) for b in asked])
    names = "+".join([b.name for b in asked])
    about = {"batch": 0, "step": step, "stage": stage, "sigma": sigma, "weight": weight, "branches": names, "rows": rows}
    return {**about, **stats}


def _measure(info: StepInfo, branches: tuple[Branch, ...], predictions: Mapping[str, Tensor], result: Result) -> dict[str, float]:
    out: dict[str, float] = {}
    if "cond" not in predictions:
        return out
    with torch.no_grad():  # statistics only
        for branch in (b for b in branches if b.name == "uncond" and "uncond" in predictions):
            a, b = ((info.x - info.alpha * predictions[n]).flatten(1) for n in ("cond", "uncond"))
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).cpu()
            out["cosine"] = float((cosine if branch.mask is None else cosine[branch.mask]).mean())
        denoised = result.absorbed(info).denoised
        out["update_norm"] = float(torch.linalg.vector_norm((denoised - predictions["cond"]).flatten(1), dim=1).mean())
    return out


def _join(parts: list[Condition]) -> Condition:
    first = parts[0]
    if len({type(part) for part in parts}) > 1:
        raise ValueError(
            f"conditions are of different kinds ({', '.join(type(p).__name__ for p in parts)}); give all branches the same"
        )
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Mapping):
        return {key: _join([p[key] for p in parts]) for key in first}
    return torch.cat(parts)


def _rows(condition: Condition, mask: Tensor) -> Condition:
    if condition is None:
        return None
    if isinstance(condition, Mapping):
        return {key: _rows(value, mask) for key, value in condition.items()}
    return condition[mask.to(condition.device)]
