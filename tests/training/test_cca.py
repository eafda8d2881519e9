"""CCA's loss: the official values, and a table small enough that its optimum is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from genkit.training.cca import cca_loss, matching_lambda

GOLDEN = Path(__file__).parent.parent / "golden"


def gaps(logits: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gaps of own and of others' labels: rows [:B] and [B:] of the logits, each with the tokens of the images."""
    index = tokens.repeat(2, 1)[..., None]
    log_p = [x.log_softmax(-1).gather(-1, index)[..., 0].sum(1) for x in (logits, reference)]
    own, other = (log_p[0] - log_p[1]).chunk(2)
    return own, other


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
@pytest.mark.parametrize("beta", ["0.02", "0.5"])
@pytest.mark.parametrize("lam", ["0.5", "50.0", "1000.0"])
def test_official_loss_and_gradient(dropout: str, beta: str, lam: str) -> None:
    data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "samplers" / "cca_loss.npz").items()}
    logits = data["policy_logits"].double().requires_grad_()
    own, other = gaps(logits, data["ref_logits"].double(), data["tokens"])
    labels = data["labels"]
    positive = (data["uniform"] < float(dropout)) | (labels.roll(-1) == labels) if float(dropout) else None
    loss = cca_loss(own, other, beta=float(beta), lam=float(lam), positive=positive)
    name = f"CCA_u{dropout}_b{beta}_l{lam}"
    assert loss.item() == pytest.approx(data[f"{name}_loss"].item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = data[f"{name}_grad"].double()
    assert (grad - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("case", [0, 1, 3])
def test_official_cases(case: int) -> None:
    with safe_open(GOLDEN / "ar" / "cca_loss.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["meta"])["cases"][case]
        prefix = f"{settings['case']}."
        data = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    logits = data["logits"].double().requires_grad_()
    own, other = gaps(logits, data["ref_logits"].double(), data["targets"])
    labels, positive = data["labels"], None
    if settings["uncond_ratio"]:
        positive = data["uncond_mask"] | (labels.roll(-1) == labels)
    loss = cca_loss(own, other, beta=settings["beta"], lam=settings["lambda_"], positive=positive)
    assert loss.item() == pytest.approx(settings["loss"], rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0].float(), data["grad_logits"], atol=1e-6, rtol=1e-6)


# Three classes over six tokens: the same counts, moved on by two for each class.
COUNTS = torch.stack([torch.tensor([6, 2, 1, 1, 1, 1]).roll(2 * c) for c in range(3)])
P = COUNTS.double() / 12
MARGINAL = P.mean(0)


def table_loss(log_p: Tensor, beta: float, lam: float) -> Tensor:
    """CCA over every token of every class as often as it comes, and every token beside every label: exact expectations."""
    gap = log_p - P.log()
    own = torch.cat([gap[c].repeat_interleave(COUNTS[c]) for c in range(3)])
    other = torch.cat([gap[c].repeat_interleave(COUNTS.sum(0)) for c in range(3)])
    return cca_loss(own, other, beta=beta, lam=lam)


def log_ratio() -> Tensor:
    """``log p(x|c) - log p(x)`` of draws from class 0 (by symmetry, of any class)."""
    return (P[0] / MARGINAL).log().repeat_interleave(COUNTS[0])


@pytest.mark.parametrize("scale", [2.0, 3.0, 5.0])
def test_with_the_matching_lambda_the_optimum_is_guidance(scale: float) -> None:
    beta = 1 / (scale - 1)
    guided = (P.log() + (scale - 1) * (P.log() - MARGINAL.log())).log_softmax(-1)
    lam = float(matching_lambda(log_ratio(), beta))
    z = (P[0] * (P[0] / MARGINAL) ** (1 / beta)).sum()
    assert lam == pytest.approx(float(z) ** beta)

    def slope(lam: float) -> float:
        logits = guided.clone().requires_grad_()
        return float(torch.autograd.grad(table_loss(logits.log_softmax(-1), beta, lam), logits)[0].abs().max())

    assert slope(lam) < 1e-12
    assert slope(1.2 * lam) > 1e-3


def test_lambda_is_the_guidance_scale() -> None:
    """Trained from the reference, the table becomes the guided one; smaller lambdas sharpen it less, larger ones more."""
    beta, power = 0.5, {}
    match = float(matching_lambda(log_ratio(), beta))
    for lam in (0.5 * match, match, 2 * match):
        logits = P.log().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(logits: Tensor = logits, lam: float = lam, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = table_loss(logits.log_softmax(-1), beta, lam)
            loss.backward()
            return loss

        optimizer.step(closure)
        learned = logits.detach().log_softmax(-1)
        power[lam] = float((learned[0, 0] - learned[0, 1] - (P[0, 0] / P[0, 1]).log()) / (log_ratio()[0] - log_ratio()[6]))
        if lam == match:
            guided = (P.log() + (P.log() - MARGINAL.log()) / beta).log_softmax(-1)
            torch.testing.assert_close(learned, guided, atol=1e-4, rtol=0)
    low, middle, high = power.values()
    assert low < middle - 0.1 < high - 0.2
    assert middle == pytest.approx(1 / beta, abs=1e-3)


def test_settings_that_make_no_sense() -> None:
    for bad in ({"beta": 0.0, "lam": 1.0}, {"beta": 0.1, "lam": -1.0}):
        with pytest.raises(ValueError, match="give positive numbers"):
            cca_loss(torch.zeros(2), torch.zeros(2), **bad)
