"""Classifier guidance, and the gradient that it and its relatives follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.guidance.base import COND, Branch, Guidance, Host, Need, Predictions, Result, StepInfo, check_number


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of ``function(x)`` (B,) with respect to ``x`` (B, ...), each sample's own; also under ``torch.no_grad``.

    It comes detached, unless the caller differentiates: gradients are on and ``x`` requires one.

    Raises:
        ValueError: ``function`` does not give one number per sample, or gives numbers that do not depend on ``x``.
        RuntimeError: under ``torch.inference_mode``, where nothing can be differentiated.
    """
    check_gradients()
    differentiable = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if differentiable else x.detach().requires_grad_()
        value = function(point)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"a gradient is taken of one number per sample, shape ({len(x)},), but the model gave {tuple(value.shape)}"
            )
        if not value.requires_grad:
            raise ValueError("the model's value does not depend on x: it must not detach or use torch.no_grad inside")
        return torch.autograd.grad(value.sum(), point, create_graph=differentiable)[0]


def check_gradients() -> None:
    """Raise RuntimeError where PyTorch cannot differentiate at all."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("this guidance needs gradients, which torch.inference_mode forbids; use torch.no_grad instead")


def class_gradient(classifier: Any, info: StepInfo, condition: Any) -> Tensor:
    """``grad_x log p(condition | x)`` with respect to ``info.x``, whatever the coordinates the classifier works in.

    Args:
        classifier: ``classifier(x, sigma, condition) -> log p`` (B,), ``sigma`` (B,), x in the coordinates of its ``path``.
    """
    sigma = info.s / info.alpha
    ratio = classifier.path(sigma)[0] / info.alpha
    levels = torch.full((len(info.x),), sigma, dtype=torch.float64, device=info.x.device)
    return gradient(lambda x: classifier(ratio * x, levels, condition), info.x)


@dataclass(frozen=True)
class _Scored(Guidance):
    """The conditional prediction with the score ``(w - 1) g``, g from :meth:`ascent`."""

    scale: float
    requires: ClassVar[frozenset[Need]] = frozenset({"refine", "gradient"})

    def __post_init__(self) -> None:
        check_number(self, "scale")

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return (COND,)

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return Result(predictions["cond"]), state

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        w = self.weight(info)
        if w == 1 or info.alpha == 0:  # pure noise says nothing about the image
            return result, state
        score = (w - 1) * self.ascent(info, run)
        return result._replace(score=score if result.score is None else result.score + score), state

    def ascent(self, info: StepInfo, run: Host) -> Tensor:
        """The gradient with respect to ``info.x`` along which the image is pushed."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClassifierGuidance(_Scored):
    """``score = (w - 1) grad_x log p(c | x)``, that is ``D = D_c + (w - 1)(s^2 / alpha) grad_x log p(c | x)``.

    Dhariwal & Nichol 2021, alg. 2; their scale s is ``w - 1``. With an exact classifier this is CFG of the same scale, since
    ``grad_x log p(c | x)`` is then the difference of the conditional and the unconditional score. Costs a forward and a backward
    pass of the classifier per evaluation, and no row of the denoiser. For an unconditional denoiser the condition
    only reaches the classifier, and ``w = 2`` samples p(x | c).

    Args:
        scale: w, 1 means no guidance (the classifier is then not evaluated), below 1 pushes away from the class.
        model: name of the classifier among the run's models: ``classifier(x, sigma, condition) -> log p(condition | x)`` (B,),
            differentiable, trained on noisy images; ``classifier.path`` says in which coordinates it takes x.

    Raises:
        ValueError: scale is not a finite number; in a run, there is no such model.
    """

    model: str = "classifier"
    examples: ClassVar[tuple[str, ...]] = ("ClassifierGuidance(3.0)", "ClassifierGuidance(0.5, model='classifier')")

    def ascent(self, info: StepInfo, run: Host) -> Tensor:
        return class_gradient(run.model(self.model), info, run.conditions["cond"])
