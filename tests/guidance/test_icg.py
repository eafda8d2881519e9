"""Independent condition guidance: what is drawn, and that on average it is CFG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import genkit
from genkit.denoiser import EDMDenoiser, Guided
from genkit.guidance import CFG, COND
from genkit.guidance.icg import ICG, independent
from tests.toys import LABELS, Mixture, Run, reference, step_info


class Labelled(Mixture):
    """The exact mixture, which says how many classes it has."""

    num_classes = 3


class Plain:
    """A denoiser that says nothing of its condition."""

    path = EDMDenoiser.path

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return x


def host(seeds: list[int] | None, condition: Any = None, model: Any = None, batch: int | None = None) -> Guided:
    batch = batch or len(seeds or [0, 0, 0])
    condition = torch.zeros(batch, dtype=torch.long) if condition is None else condition
    return Guided(model or Labelled.random(4), ICG(3.0), {"cond": condition}, batch, seeds=seeds)


def info(batch: int, **where: Any) -> Any:
    return step_info(torch.zeros(batch, 4, dtype=torch.float64), **{"index": 0, "total": 10, **where})


# ---- class labels ----


def test_labels_are_drawn_uniformly_from_all_classes() -> None:
    labels, seeds = torch.zeros(3000, dtype=torch.int32), list(range(3000))
    drawn = independent(labels, info(3000), host(seeds))
    assert drawn.dtype == torch.int32
    counts = torch.bincount(drawn, minlength=3).double()
    assert len(counts) == 3  # never the dropped label
    assert float(((counts - 1000).square() / 1000).sum()) < 13.8  # chi-square with 2 degrees of freedom, 1 in 1000
    later = independent(labels, info(3000, index=1), host(seeds))
    joint = torch.bincount(3 * drawn + later, minlength=9).double()
    assert float(((joint - 3000 / 9).square() / (3000 / 9)).sum()) < 26.1  # steps are independent: 8 degrees


def test_a_draw_is_that_of_the_seed_and_the_step() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    drawn = [independent(labels, info(8, index=i), host(list(range(8)))) for i in range(20)]
    for i in range(20):
        alone = [independent(torch.tensor([2]), info(1, index=i), host([k])) for k in range(8)]  # whatever the class asked for
        assert torch.equal(torch.cat(alone), drawn[i])
        assert torch.equal(independent(labels, info(8, index=i, stage="second"), host(list(range(8)))), drawn[i])
    assert len({tuple(d.tolist()) for d in drawn}) == 20


def test_labels_in_a_mapping_are_known_by_their_name() -> None:
    condition = {"class_labels": torch.tensor([0, 1, 2]), "call": torch.tensor([5, 5, 5])}
    drawn = [independent(condition, info(3, index=i), host([0, 1, 2], condition, Labelled.random(4))) for i in range(9)]
    assert len({tuple(d["class_labels"].tolist()) for d in drawn}) > 5
    assert all(torch.equal(d["call"], condition["call"]) for d in drawn)


# ---- embeddings ----


def test_embeddings_are_drawn_with_the_moments_of_their_sample() -> None:
    g = torch.Generator().manual_seed(0)
    spread, shift = torch.tensor([0.5, 1.0, 4.0])[:, None, None], torch.tensor([0.0, -3.0, 10.0])[:, None, None]
    y = shift + spread * torch.randn(3, 60, 50, generator=g)
    condition = {"text": y, "mask": torch.ones(3, 60), "size": torch.tensor([0, 1, 2])}
    drawn = independent(condition, info(3), host([4, 5, 6], condition, Plain()))
    assert all(torch.equal(drawn[key], condition[key]) for key in ("mask", "size"))
    error = 5 * spread.flatten() / 3000**0.5
    assert ((drawn["text"].mean((1, 2)) - y.mean((1, 2))).abs() < error).all()
    assert ((drawn["text"].std((1, 2)) - y.std((1, 2))).abs() < error).all()
    correlation = torch.corrcoef(torch.stack([y.flatten(1)[2], drawn["text"].flatten(1)[2]]))[0, 1]
    assert abs(float(correlation)) < 0.1


def test_labels_of_a_model_without_classes_are_drawn_as_embeddings() -> None:
    drawn = independent(LABELS, info(4), host([0, 1, 2, 3], LABELS, Mixture.random(4)))
    assert drawn.shape == (4, 6)
    assert drawn.is_floating_point()


# ---- in a run ----


def test_the_formula() -> None:
    model, seeds = Labelled.random(4), [2, 3, 4, 5]
    here = step_info(torch.ones(4, 4, dtype=torch.float64), sigma=0.8)
    run = Guided(model, ICG(3.0), {"cond": LABELS}, 4, seeds=seeds)
    random = independent(LABELS, here, run)
    sigma = torch.full((4,), 0.8, dtype=torch.float64)
    strong, other = model(here.x, sigma, LABELS), model(here.x, sigma, random)
    torch.testing.assert_close(run(here).denoised, strong + 2 * (strong - other), rtol=0, atol=1e-12)
    assert (run.ledger.nfe, run.ledger.calls) == ([2] * 4, 1)
    assert ICG(1.0).plan(here, None) == (COND,)


def test_at_high_noise_its_mean_is_cfg() -> None:
    """There x says nothing of the class, so the unconditional prediction is the mean over classes of the conditional one."""
    model, n = Labelled.random(4), 4000
    x = 100 * torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = step_info(x.expand(n, 4), sigma=100.0)
    labels = torch.zeros(n, dtype=torch.long)
    given = {"cond": labels, "uncond": torch.full_like(labels, -1)}
    icg, cfg = (Guided(model, made, given, n, seeds=range(n))(here).denoised for made in (ICG(3.0), CFG(3.0)))
    error = icg.std(0) / n**0.5
    assert ((icg.mean(0) - cfg[0]).abs() < 5 * error + 1e-3).all()
    assert (error < 0.1).all()
    assert (icg - cfg).abs().max() > 0.1


def test_no_unconditional_condition_is_needed() -> None:
    assert -1 not in {label for call in Run(ICG(3.0)).log for label in call}
    assert (reference(ICG(3.0)).out - reference(CFG(3.0)).out).abs().max() > 1e-3


def test_without_seeds_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"seeds=None, but ICG\(scale=3.0\) draws random numbers"):
        host(None)(info(3))


def test_a_condition_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="ICG draws class labels, but the model neither says its num_classes nor"):
        host([0, 1, 2], model=Plain())(info(3))
    both = {"text_embeds": torch.ones(3, 4), "class_labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="ICG draws class labels"):  # a class left as it is would not be independent
        host([0, 1, 2], both, Plain())(info(3))
    with pytest.raises(ValueError, match=r"ICG changes the embedding .* finds none in it \(size, mask\)"):
        host([0, 1, 2], {"size": torch.tensor([1, 2, 3]), "mask": torch.ones(3, 4)}, Plain())(info(3))


def test_the_built_in_model() -> None:
    pipe = genkit.load("builtin/cifar10")
    made = {
        g: pipe(classes=[3, 5], seeds=[0, 1], guidance=g, sampler="euler", steps=3)
        for g in ("none", "ICG(2.0)", "CADS(CFG(2.0))", "CFG(2.0)")
    }
    assert [out.nfe for out in made.values()] == [[3, 3], [6, 6], [6, 6], [6, 6]]
    latents = [out.latents for out in made.values()]
    assert all(a.isfinite().all() for a in latents)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(latents) for b in latents[:i])
    alone = pipe(classes=5, seeds=1, guidance="ICG(2.0)", sampler="euler", steps=3)
    torch.testing.assert_close(alone.latents[0], latents[1][1], rtol=0, atol=1e-4)
