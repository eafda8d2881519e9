"""Classifier guidance: the identity with CFG under an exact classifier, coordinates, gradient modes, messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.denoiser import Condition, Guided
from genkit.guidance import CFG, Interval, parse
from genkit.guidance.classifier import ClassifierGuidance, gradient
from genkit.noise import FLOW, VE, VP, Path
from tests.toys import LABELS, MAIN, OTHERS, SHAPE, Classifier, Run, conditions, reference, step_info

PATHS = {"ve": VE, "vp": VP, "flow": FLOW}


def unequal(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def guided(scale: float = 3.0, **models: object) -> Guided:
    return Guided({"main": MAIN, **OTHERS, **models}, ClassifierGuidance(scale), conditions(LABELS), 4)


def point(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


class OnPath:
    """The exact classifier, taking x in the coordinates of another path."""

    def __init__(self, inner: Classifier, path: Path) -> None:
        self.inner, self.path = inner, path

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
        assert sigma.shape == (len(x),)
        return self.inner(x / self.path(float(sigma[0]))[0], sigma, condition)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ["heun", "ddim(eta=1)", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_an_exact_classifier_gives_cfg(scale: float, sampler: str, path: str) -> None:
    run = Run(ClassifierGuidance(scale), sampler, path=PATHS[path])
    cfg = Run(CFG(scale), sampler, path=PATHS[path])
    assert unequal(run.out, cfg.out) < 1e-9
    assert unequal(run.out, reference(CFG(1.5), sampler, PATHS[path]).out) > 1e-2
    assert [2 * n for n in run.nfe] == cfg.nfe


def test_inside_an_interval_too() -> None:
    run, cfg = (Run(Interval(made, 0.2, 1.0)) for made in (ClassifierGuidance(3.0), CFG(3.0)))
    assert unequal(run.out, cfg.out) < 1e-9
    assert run.nfe == [11] * 4


@pytest.mark.parametrize("classifier_path", PATHS)
@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_is_in_the_samplers_coordinates(path: str, classifier_path: str) -> None:
    info = step_info(point(), sigma=0.7, path=PATHS[path])
    score = guided(classifier=OnPath(OTHERS["classifier"], PATHS[classifier_path]))(info).score
    assert score is not None
    levels = torch.full((4,), 0.7, dtype=torch.float64)
    for i in range(4):  # central differences along each coordinate of x
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[:, i] = 1e-5
        up, down = (
            OTHERS["classifier"]((info.x + sign * step.reshape(4, *SHAPE)) / info.alpha, levels, LABELS) for sign in (1, -1)
        )
        torch.testing.assert_close(score.flatten(1)[:, i], 2 * (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_works_without_gradients_and_leaves_none() -> None:
    x = point()
    plain = guided()(step_info(x)).score
    with torch.no_grad():
        score = guided()(step_info(x)).score
        assert not torch.is_grad_enabled()
    assert score is not None
    assert torch.equal(score, plain)
    assert not plain.requires_grad
    assert not score.requires_grad
    with torch.no_grad():
        assert not guided()(step_info(x.requires_grad_())).absorbed(step_info(x)).denoised.requires_grad


def test_is_differentiable_where_the_caller_differentiates() -> None:
    def step(x: Tensor) -> Tensor:
        info = step_info(x, sigma=0.8, path=VP)
        return guided()(info).absorbed(info).denoised

    assert torch.autograd.gradcheck(step, point().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    info = step_info(point(dtype))
    result = guided()(info).absorbed(info)
    assert result.denoised.dtype == dtype
    assert unequal(result.denoised.double(), guided()(step_info(point())).absorbed(step_info(point())).denoised) < 1e-5


def test_pure_noise_has_no_score() -> None:
    info = step_info(point(), sigma=1.0)._replace(alpha=0.0, s=1.0)
    rule = ClassifierGuidance(3.0)
    result, _ = rule.combine(info, {"cond": point()}, None)
    assert rule.refine(info, result, guided(), None)[0].score is None


def test_a_missing_classifier_is_named() -> None:
    run = Guided({"main": MAIN}, parse("ClassifierGuidance(3.0, 'my_classifier')"), conditions(LABELS), 4)
    with pytest.raises(ValueError, match=r"'my_classifier'; this run has main"):
        run(step_info(point()))


def test_logits_in_place_of_one_number_are_refused() -> None:
    class Logits(OnPath):
        def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, /) -> Tensor:
            return x.flatten(1)

    with pytest.raises(ValueError, match=r"one number per sample, shape \(4,\), but the model gave \(4, 4\)"):
        guided(classifier=Logits(OTHERS["classifier"], VE))(step_info(point()))


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend on x"):
        gradient(lambda x: x.detach().flatten(1).sum(1), point())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad instead"):
        gradient(lambda x: x.flatten(1).sum(1), point())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "3"])
def test_scale_must_be_a_finite_number(scale: object) -> None:
    with pytest.raises(ValueError, match="ClassifierGuidance: scale="):
        ClassifierGuidance(scale)  # type: ignore[arg-type]
