"""MinorityPrompt: one token of the prompt is optimised during sampling, towards images that are rare for the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from genkit.guidance.base import (
    COND,
    Branch,
    Host,
    Need,
    Predictions,
    Result,
    StepInfo,
    Transform,
    _Combinator,
    check_count,
    check_number,
)
from genkit.guidance.classifier import check_gradients
from genkit.guidance.levels import noise_level
from genkit.guidance.minority import l2

FIRST_DRAW = 2000  # of the run's noise: far from what the method inside may draw


def prompt_surprise(clean: Tensor, again: Tensor, balance: float) -> Tensor:
    """``|stop(z) - z'| + balance |z - stop(z')|`` per sample (B,); ``z'`` may depend on ``z``."""
    return l2(clean.detach(), again) + balance * l2(clean, again.detach())


def prompt_tokens(condition: Any) -> tuple[Any, Tensor]:
    """Where a condition holds its token embeddings (None or a key), and the embeddings (B, tokens, dim) or (B, dim).

    In a mapping they are its only floating-point tensor of the most axes. Raises ValueError where that is not one.
    """
    entries = dict(condition) if isinstance(condition, Mapping) else {None: condition}
    real = {k: v for k, v in entries.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim in (2, 3)}
    most = max((v.ndim for v in real.values()), default=0)
    found = [(key, v) for key, v in real.items() if v.ndim == most]
    if len(found) != 1:
        names = ", ".join(map(str, entries))
        raise ValueError(
            "MinorityPrompt needs a condition with one tensor of token embeddings (batch, tokens, dim) or (batch, dim); "
            f"it found {len(found)} in {type(condition).__name__} ({names})"
        )
    return found[0]


def with_token(tokens: Tensor, token: Tensor, position: int) -> Tensor:
    """``tokens`` (B, T, dim) with ``token`` (B, dim) at ``position``; of ``tokens`` (B, dim) it is all."""
    if tokens.ndim == 2:
        return token.to(tokens)
    out = tokens.clone()
    out[:, position] = token.to(tokens)
    return out


@dataclass(frozen=True, eq=False)
class _Place:
    """The transform that puts the optimised token into the condition, before any other transform of the branch."""

    token: Tensor
    position: int
    then: Transform | None = None

    def __call__(self, condition: Any, info: StepInfo, run: Host) -> Any:
        if "encode" in run.models:
            condition = run.model("encode")(with_token(run.conditions["tokens"], self.token, self.position))
        else:
            embedded = run.embed(condition)
            key, tokens = prompt_tokens(embedded)
            placed = with_token(tokens, self.token, self.position)
            condition = placed if key is None else {**embedded, key: placed}
        return condition if self.then is None else self.then(condition, info, run)


class PromptState(NamedTuple):
    inner: Any
    token: Tensor | None  # (B, dim): the optimised embedding, from the first active step on


@dataclass(frozen=True)
class MinorityPrompt(_Combinator):
    """``inner`` with one token e of the condition optimised in the run: ``max_e |stop(z) - z'| + balance |z - stop(z')|``.

    ``z = D(x; e)``, ``z' = D(z + at n; at)`` under the plain prompt; a few iterations of Adam in every active step, from the
    embedding reached before, which stays in place to the end (Um & Ye 2025). Each iteration costs two rows and a backward pass
    through both. Only the main model sees the token. Where the scale of ``inner`` is 1 nothing is done. To a caller who
    differentiates, the optimised token is a constant.

    The token stands at ``position`` in the prompt and starts from what is there (the authors append one). With a model
    ``encode(tokens) -> condition`` and a condition ``tokens`` (B, T, dim), input embeddings of the prompt, the encoder runs anew
    at every iteration, as theirs does; else the *encoded* prompt is changed, or a condition of one vector (B, dim) as a whole.

    Args:
        inner: a guidance with a conditional branch, CFG for example.
        at: sigma at which the second look is taken, positive and finite; 4.1 is the authors' 0.75 of Stable Diffusion's schedule.
        until: optimise only in steps that begin above this sigma; 8.3 is the authors' 0.9, the first tenth of the steps.
        every: only in every so many-th step.
        iterations: steps of Adam at each of them.
        lr: its learning rate, in units of the embedding.
        balance: lambda, weight of the second term, from 0.
        position: which token, negative ones counting from the end.

    Raises:
        ValueError: an argument outside its range; in a run, a condition without embeddings, or steps without noise level.
        RuntimeError: in a run, under ``torch.inference_mode``.
    """

    at: float = 4.1
    until: float = 8.3
    every: int = 1
    iterations: int = 3
    lr: float = 0.01
    balance: float = 1.0
    position: int = -1
    requires: ClassVar[frozenset[Need]] = frozenset({"prepare", "gradient", "noise"})
    examples: ClassVar[tuple[str, ...]] = (
        "MinorityPrompt(CFG(3.0), at=1.5, until=1.0)",
        "MinorityPrompt(CFG(2.0), at=1.0, until=0.0, every=2, iterations=1, lr=0.1, balance=0.5)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "at", 0.0, 1e9, inside=True)
        check_number(self, "lr", 0.0, 1e9, inside=True)
        for name in ("until", "balance"):
            check_number(self, name, 0.0, math.inf if name == "until" else 1e9)
        for name in ("every", "iterations"):
            check_count(self, name, 1)
        check_count(self, "position", -(10**6))

    def init(self, batch: int) -> PromptState:
        return PromptState(self.inner.init(batch), None)

    def prepare(self, info: StepInfo, run: Host, state: PromptState) -> PromptState:
        sigma = noise_level(info, "MinorityPrompt: at is a noise level", "it with a diffusion model")
        due = info.stage == "step" and sigma > self.until and info.index % self.every == 0
        if due and self.weight(info) != 1:
            state = state._replace(token=self.optimise(info, run, state.token))
        return state._replace(inner=self.inner.prepare(info, run, state.inner))

    def plan(self, info: StepInfo, state: PromptState) -> tuple[Branch, ...]:
        branches = self.inner.plan(info, state.inner)
        if state.token is None or self.weight(info) == 1:
            return branches
        return tuple(self.placed(b, state.token) if (b.condition, b.model) == ("cond", "main") else b for b in branches)

    def combine(self, info: StepInfo, predictions: Predictions, state: PromptState) -> tuple[Result, PromptState]:
        result, inner = self.inner.combine(info, predictions, state.inner)
        return result, state._replace(inner=inner)

    def refine(self, info: StepInfo, result: Result, run: Host, state: PromptState) -> tuple[Result, PromptState]:
        result, inner = self.inner.refine(info, result, run, state.inner)
        return result, state._replace(inner=inner)

    def placed(self, branch: Branch, token: Tensor) -> Branch:
        return branch._replace(transform=_Place(token, self.position, branch.transform))

    def optimise(self, info: StepInfo, run: Host, start: Tensor | None) -> Tensor:
        """The embedding (B, dim) after this step's iterations, detached."""
        check_gradients()
        if start is None:
            tokens = run.conditions["tokens"] if "encode" in run.models else prompt_tokens(run.embed(run.conditions["cond"]))[1]
            start = tokens if tokens.ndim == 2 else tokens[:, self.position]
        wide = start.dtype if start.dtype == torch.float64 else torch.float32  # Adam's epsilon is nothing in half precision
        token = start.detach().to(wide, copy=True).requires_grad_()
        adam = torch.optim.Adam([token], lr=self.lr)
        branch = self.placed(COND, token)
        info = info._replace(x=info.x.detach())
        with torch.enable_grad():
            for k in range(self.iterations):
                clean = run.evaluate(info, (branch,))["cond"]
                noisy = clean + self.at * run.noise(clean, info, FIRST_DRAW + k)
                again = run.evaluate(info._replace(x=noisy, sigma=self.at, alpha=1.0, s=self.at), (COND,))["cond"]
                loss = -prompt_surprise(clean, again, self.balance).sum()
                token.grad = torch.autograd.grad(loss, token)[0]  # of the token alone: networks keep no gradient
                adam.step()
        return token.detach()
