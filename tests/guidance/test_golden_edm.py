"""Whole trajectories of the official EDM samplers: limited-interval guidance, and guidance by a second network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit import noise
from genkit.denoiser import Guided
from genkit.guidance import CFG, Guidance, Interval, NoGuidance, Result, StepInfo
from genkit.guidance.autoguidance import Autoguidance
from genkit.noise import VE
from genkit.random import Fixed
from genkit.samplers.diffusion import SAMPLERS, sample
from tests.toys import Counting, Mixture, conditions, golden

INTERVAL, INTERVAL_META = golden("guidance/edm_interval")
SECOND, SECOND_META = golden("guidance/edm2_guiding_net")


class Trajectory:
    """A Heun run from the recorded latents, with the state and level at the first evaluation of every step."""

    def __init__(
        self, models: Any, guidance: Guidance, arrays: Any, steps: int, options: dict[str, float], draws: Fixed | None
    ) -> None:
        labels, latents = torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["latents"])
        self.guided = Guided(models, guidance, conditions(labels), len(labels))
        self.x: list[Tensor] = []
        self.s: list[float] = []
        sigmas = noise.edm(steps)

        def record(info: StepInfo, result: Result) -> None:
            self.x.append(info.x)
            self.s.append(info.s)

        self.final = sample(self.guided, latents * sigmas[0], sigmas, SAMPLERS["heun"](**options), VE, draws, record)


def interval_guidance(case: dict[str, Any]) -> Guidance:
    if case.get("no_uncond"):
        return NoGuidance()
    inner = CFG(case["G"])
    return Interval(inner, *case["guidance_interval"], unit="step") if "guidance_interval" in case else inner


def test_rebuilt_denoiser() -> None:
    model = Mixture.from_golden(INTERVAL)
    x, sigma = torch.from_numpy(INTERVAL["probe_x"]), torch.from_numpy(INTERVAL["probe_sigma"])
    labels = torch.from_numpy(INTERVAL["probe_labels"])
    for label, key in ((labels, "probe_D_cond"), (torch.full_like(labels, -1), "probe_D_uncond")):
        torch.testing.assert_close(model(x, sigma, label), torch.from_numpy(INTERVAL[key]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [pytest.param(c, id=c["key"]) for c in INTERVAL_META["cases"]])
def test_official_interval_sampler(case: dict[str, Any]) -> None:
    key, steps = case["key"], case["num_steps"]
    names = ("x_euler", "sigma_euler", "D_cond_euler", "final", "call_sigma", "call_is_uncond")
    want = {name: INTERVAL[f"{key}__{name}"] for name in names}
    options, draws = {}, None
    if "S_churn" in case:
        theirs = {"churn": "S_churn", "churn_min": "S_min", "churn_max": "S_max", "churn_noise": "S_noise"}
        options = {name: case[s] for name, s in theirs.items()}
        draws = Fixed(torch.from_numpy(INTERVAL[f"{key}__noise"]))
    net = Counting(Mixture.from_golden(INTERVAL))
    run = Trajectory(net, interval_guidance(case), INTERVAL, steps, options, draws)

    torch.testing.assert_close(run.final.float(), torch.from_numpy(want["final"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(run.s, dtype=torch.float64), torch.from_numpy(want["sigma_euler"]), rtol=1e-12, atol=0
    )
    # recorded where the first evaluation of a step is made: with churn, after it has moved x
    torch.testing.assert_close(torch.stack(run.x), torch.from_numpy(want["x_euler"]), rtol=1e-9, atol=1e-9)

    batch = len(INTERVAL["labels"])
    first = [i for i, row in enumerate(run.guided.trace.rows) if row["stage"] == "step"]
    for i, call in enumerate(first):
        torch.testing.assert_close(net.outputs[call][:batch], torch.from_numpy(want["D_cond_euler"][i]), rtol=1e-9, atol=1e-9)

    # they make one network call a branch, the unconditional one first; ours come in one call
    calls = [(float(s[0]), uncond) for s in net.sigmas for uncond in (True, False)[len(s) == batch :]]
    assert [uncond for _, uncond in calls] == want["call_is_uncond"].tolist()
    np.testing.assert_allclose([sigma for sigma, _ in calls], want["call_sigma"], rtol=1e-12)
    counted = [label < 0 for labels in net.labels for label in labels]
    assert counted.count(False) == INTERVAL[f"{key}__nfe_cond"] * batch
    assert counted.count(True) == INTERVAL[f"{key}__nfe_uncond"] * batch
    assert run.guided.ledger.nfe == [len(want["call_sigma"])] * batch
    assert run.guided.ledger.calls == 2 * steps - 1


def test_gate_by_evaluation_would_be_noticed() -> None:
    """The recorded gate holds for both evaluations of a step: shifting it by one step is far outside the tolerance."""
    key = "int17_22_g2_32"
    run = Trajectory(Mixture.from_golden(INTERVAL), Interval(CFG(2.0), 17, 21, "step"), INTERVAL, 32, {}, None)
    assert (run.final - torch.from_numpy(INTERVAL[f"{key}__final"])).abs().max() > 1e-3


def test_interval_of_steps_is_the_interval_of_their_sigmas() -> None:
    grid = noise.edm(32)
    in_sigma = Interval(CFG(2.0), float(grid[23]), float(grid[17]))  # the bound below is open, the one above closed
    run = Trajectory(Mixture.from_golden(INTERVAL), in_sigma, INTERVAL, 32, {}, None)
    torch.testing.assert_close(run.final.float(), torch.from_numpy(INTERVAL["int17_22_g2_32__final"]), rtol=1e-6, atol=1e-6)
    assert run.guided.ledger.nfe == [75] * 6


KINDS = {"auto": "cond", "uncond": "uncond"}  # what the second network is conditioned on
SECOND_RUNS = [(c, Autoguidance(c["guidance"], condition=KINDS[c["kind"]])) for c in SECOND_META["cases"]]
SECOND_RUNS += [(c, CFG(c["guidance"])) for c in SECOND_META["cases"] if c["kind"] == "uncond"]  # the same networks, one call


@pytest.mark.parametrize(("case", "guidance"), SECOND_RUNS, ids=lambda v: v["key"] if isinstance(v, dict) else type(v).__name__)
def test_guidance_by_a_second_network(case: dict[str, Any], guidance: Guidance) -> None:
    key, steps = case["key"], case["num_steps"]
    auto = isinstance(guidance, Autoguidance)
    models = {"main": Mixture.from_golden(SECOND), "weak": Mixture.from_golden(SECOND, extra=case["guiding_extra_std"])}
    run = Trajectory(models, guidance, SECOND, steps, {}, None)
    torch.testing.assert_close(run.final, torch.from_numpy(SECOND[f"{key}__final"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack(run.x), torch.from_numpy(SECOND[f"{key}__x_euler"]), rtol=1e-9, atol=1e-9)
    assert run.guided.ledger.calls == (2 * steps - 1) * (2 if auto else 1)  # one forward pass a model
    assert run.guided.ledger.nfe == [2 * (2 * steps - 1)] * 6
