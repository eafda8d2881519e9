"""CADS: the noised condition by its formula, when it acts, and what it leaves alone."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit.denoiser import EDMDenoiser, Guided
from genkit.guidance import APG, CFG, COND, Adaptive, Interval, NoGuidance
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.cads import CADS
from genkit.guidance.pag import PAG
from genkit.guidance.sum import Sum
from genkit.models.unet import UNet, UNetConfig
from genkit.noise import FLOW
from genkit.random import Keyed
from tests.toys import Run, reference, step_info

SEEDS = [3, 8, 5]
X = torch.zeros(3, 2, dtype=torch.float64)
EMBEDDING = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 + 0.5


class Spy:
    """A denoiser that keeps the conditions it is called with."""

    path = EDMDenoiser.path

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, x: Tensor, sigma: Tensor, condition: Any, /) -> Tensor:
        self.seen.append(condition)
        return x


def seen(made: Any, condition: Any = EMBEDDING, seeds: Any = SEEDS, **where: Any) -> Any:
    """What the network is conditioned on in one evaluation: the rows of cond come first."""
    spy = Spy()
    uncond = {"cond": condition, "uncond": condition}
    Guided(spy, made, uncond, 3, seeds=seeds)(step_info(X, **{"index": 1, "total": 5, "sigma": 99.0, **where}))
    return spy.seen[0]


def by_hand(y: Tensor, g: float, scale: float, psi: float, index: int = 1, name: str = "") -> Tensor:
    noise = Keyed(SEEDS)(y, index, 0, zlib.crc32(f"CADS {name}".encode())).numpy()
    out = []
    for row, n in zip(y.numpy(), noise, strict=True):
        noised = math.sqrt(g) * row + scale * math.sqrt(1 - g) * n
        rescaled = (noised - np.mean(noised)) / np.std(noised) * np.std(row) + np.mean(row)
        out.append(psi * rescaled + (1 - psi) * noised)
    return torch.from_numpy(np.stack(out))


# ---- the formula ----


@pytest.mark.parametrize("psi", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("sigma", "g"), [(99.0, 0.0), (9.0, 0.0), (3.0, 0.5), (1 / 0.35 - 1, 0.8333333)])
def test_the_noised_condition(psi: float, sigma: float, g: float) -> None:
    """Flow times 0.99, 0.9, 0.75, 0.65 between tau1 = 0.6 and tau2 = 0.9."""
    rows = seen(CADS(CFG(2.0), noise_scale=0.7, psi=psi), sigma=sigma)
    torch.testing.assert_close(rows[:3], by_hand(EMBEDDING, g, 0.7, psi), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[3:], EMBEDDING)  # the unconditional half


@pytest.mark.parametrize(
    ("time", "where", "g"),
    [
        ("flow", {"sigma": math.inf, "path": FLOW}, 0.0),
        ("flow", {"sigma": 3.0, "progress": 0.9}, 0.5),
        ("flow", {"sigma": 1.5}, 1.0),
        ("flow", {"sigma": 0.01}, 1.0),
        ("progress", {"sigma": 0.01, "progress": 0.0}, 0.0),
        ("progress", {"progress": 0.25}, 0.5),
        ("progress", {"progress": 0.4}, 1.0),
    ],
)
def test_the_schedule(time: Any, where: dict[str, Any], g: float) -> None:
    assert CADS(CFG(2.0), time=time).kept(step_info(X, **where)) == pytest.approx(g, abs=1e-12)


def test_a_step_where_annealing_begins_and_ends() -> None:
    made = CADS(CFG(2.0), tau1=0.5, tau2=0.5)
    assert [made.kept(step_info(X, sigma=s)) for s in (1.1, 1.0, 0.9)] == [0.0, 1.0, 1.0]


def test_the_rescaled_condition_has_the_moments_of_the_plain_one() -> None:
    noised, grown = (seen(CADS(CFG(2.0), noise_scale=3.0, psi=psi), sigma=3.0)[:3] for psi in (1.0, 0.0))
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(noised, (1, 2)), statistic(EMBEDDING, (1, 2)), rtol=1e-5, atol=1e-5)
    assert grown.std() > 1.2 * EMBEDDING.std()


def test_a_constant_embedding_gives_no_nan() -> None:
    flat = torch.full((3, 4), 2.0)
    assert torch.equal(seen(CADS(CFG(2.0)), flat)[:3], flat)  # its std is 0, and so that of what replaces it


# ---- noise ----


def test_noise_is_new_in_each_step_and_one_within_it() -> None:
    made = CADS(CFG(2.0))
    first, second, later = seen(made), seen(made, stage="second"), seen(made, index=2)
    assert torch.equal(first, second)
    assert (first[:3] - later[:3]).abs().max() > 0.1


def test_all_branches_with_the_condition_see_the_same_noise() -> None:
    main, weak = Spy(), Spy()
    given = {"cond": EMBEDDING, "uncond": EMBEDDING}
    made = CADS(Sum(CFG(2.0), Autoguidance(2.0)))
    Guided({"main": main, "weak": weak}, made, given, 3, seeds=SEEDS)(step_info(X, sigma=50.0))
    assert torch.equal(weak.seen[0], main.seen[0][:3])
    assert not torch.equal(weak.seen[0], EMBEDDING)
    assert [b.transform is None for b in CADS(PAG(2.0)).plan(step_info(X, sigma=50.0), None)] == [False, False]


@pytest.mark.parametrize(
    "made",
    [
        CADS(CFG(2.0), noise_scale=0.0),
        CADS(CFG(2.0), noise_scale=0.0, psi=0.0),
        CADS(CFG(1.0)),
        CADS(NoGuidance()),
        CADS(CFG(2.0), tau1=1.0, tau2=1.0),
        CADS(Interval(CFG(2.0), 0.0, 1.0)),
    ],
    ids=str,
)
def test_where_it_is_off_nothing_is_drawn_and_nothing_changed(made: CADS) -> None:
    assert torch.equal(seen(made, seeds=None), seen(made.inner, seeds=None))


def test_without_seeds_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"seeds=None, but CADS\(.* draws random numbers"):
        seen(CADS(CFG(2.0)), seeds=None)


def test_noise_scale_0_is_inner_on_a_whole_run() -> None:
    assert torch.equal(Run(CADS(APG(4.0), noise_scale=0.0)).out, reference(APG(4.0)).out)
    assert (Run(CADS(APG(4.0), noise_scale=0.1, tau1=0.1)).out - reference(APG(4.0)).out).abs().max() > 1e-3


@pytest.mark.parametrize("text", ["inside", "outside"])
def test_samples_that_stop_being_guided_do_not_depend_on_their_batch(text: str) -> None:
    """They keep the noised condition: it would otherwise depend on whether another sample is still guided."""
    made = Adaptive(CADS(CFG(3.0), 0.1, 0.2), 0.991) if text == "inside" else CADS(Adaptive(CFG(3.0), 0.991), 0.1, 0.2)
    run = Run(made)
    assert len(set(run.nfe)) > 1
    for i in range(4):
        alone = Run(made, rows=(i,))
        assert (alone.out[0] - run.out[i]).abs().max() < 1e-9
        assert alone.nfe == [run.nfe[i]]


# ---- conditions of every kind ----


def test_of_a_mapping_only_embeddings_are_noised() -> None:
    condition: dict[str, Any] = {
        "more": {"encoder_hidden_states": EMBEDDING, "text_attention_mask": torch.ones(3, 4)},
        "control.encoder_hidden_states": EMBEDDING,
        "control.controlnet_cond": torch.ones(3, 3, 8, 8),
        "added.aspect_ratio": torch.ones(3, 1),
        "pooled": EMBEDDING[:, 0].half(),
        "added.text_ids": torch.ones(3, 6),
        "label": torch.tensor([0, 1, 2]),
        "guidance": torch.tensor([1.0, 2.0, 3.0]),
    }
    out = seen(CADS(CFG(2.0), psi=0.0), condition)
    more = {key: value[:3] for key, value in out.pop("more").items()}
    out = {key: value[:3] for key, value in out.items()}
    noised = by_hand(EMBEDDING, 0.0, 0.25, 0.0, name="encoder_hidden_states")
    assert torch.equal(more["encoder_hidden_states"], noised)
    assert torch.equal(out["control.encoder_hidden_states"], noised)  # the same text
    assert out["pooled"].dtype == torch.float16
    expected = by_hand(EMBEDDING[:, 0], 0.0, 0.25, 0.0, name="pooled")
    torch.testing.assert_close(out["pooled"].float(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(more["text_attention_mask"], torch.ones(3, 4))
    kept = ("control.controlnet_cond", "added.aspect_ratio", "added.text_ids", "label", "guidance")
    assert all(torch.equal(out[key], condition[key]) for key in kept)


def test_labels_are_noised_as_the_embeddings_of_their_network() -> None:
    def model(seed: int) -> EDMDenoiser:
        torch.manual_seed(seed)
        return EDMDenoiser(UNet(UNetConfig(image_size=4, num_classes=3, channels=(8,), embedding=16, groups=4)))

    labels, given = torch.tensor([2, 0, 1]), dict[str, Any]()
    models = {"main": model(0), "weak": model(1)}
    for name, net in models.items():
        net.network.register_forward_pre_hook(lambda module, args, name=name: given.update({name: args[2]}))
    made = CADS(Autoguidance(2.0), psi=0.0)
    run = Guided(models, made, {"cond": labels}, 3, seeds=SEEDS)
    run(step_info(torch.zeros(3, 3, 4, 4), index=1, total=5, sigma=3.0))
    for name, net in models.items():
        expected = by_hand(net.embed(labels).detach(), 0.5, 0.25, 0.0)
        torch.testing.assert_close(given[name], expected)


@pytest.mark.parametrize(
    "condition",
    [torch.tensor([0, 1, 2]), {"text_mask": torch.ones(3, 4)}, {"y": torch.ones(3, 4)}, torch.ones(3)],
    ids=["labels", "mask", "unknown name", "1d"],
)
def test_a_condition_without_embedding(condition: Any) -> None:
    with pytest.raises(ValueError, match=r"CADS changes the embedding of the condition, but finds none in it"):
        seen(CADS(CFG(2.0)), condition)


# ---- arguments ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau1": 0.9, "tau2": 0.6}, "tau1=0.9 is above tau2=0.6"),
        ({"tau2": 1.5}, "tau2=1.5 must be a number from 0 to 1"),
        ({"psi": -0.1}, "psi=-0.1 must be"),
        ({"noise_scale": -1.0}, "noise_scale=-1.0 must be"),
        ({"noise_scale": math.inf}, "noise_scale=inf must be"),
        ({"time": "sigma"}, "time='sigma' must be 'flow' or 'progress'"),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CADS: {message}"):
        CADS(CFG(2.0), **changes)
    with pytest.raises(TypeError, match=r"CADS: inner=2\.0 must be a guidance"):
        CADS(2.0)  # type: ignore[arg-type]


def test_the_weight_that_switches_it_off_may_come_from_outside() -> None:
    assert CADS(CFG(2.0)).plan(step_info(X, sigma=50.0, weight=1.0), None) == (COND,)
