"""Names, options, grids and errors of the sampler table, and what a callback sees."""

import math

import pytest
import torch

from genkit.guidance.base import Result
from genkit.noise import FLOW, GRIDS, VE, VP, edm
from genkit.samplers import SAMPLERS, sample
from genkit.samplers.diffusion import Sampler, find_sampler, register, start
from tests.gaussians import Gaussians, noise_free, solve

X = torch.ones(2, 1, dtype=torch.float64)
NAMES = {"euler", "heun", "euler_ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "flow_euler", "flow_heun"}
NAMES |= {"restart", "pcg", "iddpm"}


def test_the_table_is_complete_and_documented():
    assert set(SAMPLERS) >= NAMES
    for name, sampler in SAMPLERS.items():
        assert sampler.name == name
        assert sampler.order >= 1
        assert sampler.grid in GRIDS
        assert len(sampler.doc) > 10


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_per_step(name):
    model = Gaussians()
    solve(model, X, edm(5), noise_free(name))
    assert len(model.rows) == (9 if "heun" in name or name == "restart" else 5)
    assert set(model.rows) == {2}


@pytest.mark.parametrize("text", ["heun", "heun()", "heun(churn=40, churn_max=50)", "ddim(eta=0.5)", "euler"])
def test_expressions_read_back(text):
    sampler = find_sampler(text)
    assert find_sampler(str(sampler)) == sampler
    assert find_sampler(sampler) is sampler


def test_options_make_a_new_sampler():
    churned = SAMPLERS["heun"](churn=40)
    assert churned.options["churn"] == 40
    assert SAMPLERS["heun"].options["churn"] == 0
    assert churned.order == SAMPLERS["heun"].order
    assert "churn=40" in str(churned)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("huen", "sampler: unknown name 'huen'; did you mean heun"),
        ("zzz", "known names: .*dpmpp_2m"),
        ("heun(eta=1)", "'heun' has no option 'eta'; its options: churn"),
        ("euler(eta=1)", "'euler' has no option 'eta'; its options: none"),
        ("ddim(eta=-1)", "eta=-1 must be a number from 0 on"),
        ("ddim(eta=nan)", "eta=nan must be a number from 0 on"),
        ("ddim(eta=True)", "eta=True must be"),
        ("ddim(eta='big')", "eta='big' must be"),
        ("pcg(corrections=1.5)", "corrections=1.5 must be a whole number"),
        ("restart(times=inf)", "times=inf must be a whole number"),
        ("__import__('os')", "unknown name '__import__'"),
        ("heun.step", "not allowed"),
        ("heun(", "not an expression"),
        ("", "sampler='' must be an expression"),
        (5, "sampler=5 must be an expression"),
        ("3", "is not a sampler; use one of .*euler"),
    ],
)
def test_bad_samplers_are_explained(text, message):
    with pytest.raises(ValueError, match=message):
        find_sampler(text)


@pytest.mark.parametrize("levels", [[1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [1.0], [1.0, -0.5], [math.nan, 0.0], [2.0, math.nan]])
def test_grids_must_fall(levels):
    with pytest.raises(ValueError, match=r"sigmas=.*strictly falling noise levels, ending at 0 or above"):
        solve(Gaussians(), X, torch.tensor(levels), "euler")


def test_the_start_is_on_its_path():
    n, image = torch.full((1, 2), 3.0), torch.full((1, 2), 0.5)
    grid = torch.tensor([4.0, 0.0])
    assert torch.equal(start(n, grid, VE), 4 * n)
    torch.testing.assert_close(start(n, grid, FLOW, image), 0.2 * image + 0.8 * n)
    torch.testing.assert_close(start(n, torch.tensor([math.inf, 0.0]), VP), n)


def test_the_callback_sees_each_step_once():
    seen = []
    solve(Gaussians([0.5], [0.1]), X, edm(4), "heun", callback=lambda info, result: seen.append((info, result)))
    assert [(info.index, info.total, info.stage) for info, _ in seen] == [(i, 4, "step") for i in range(4)]
    assert [info.sigma for info, _ in seen] == edm(4)[:-1].tolist()
    assert [info.sigma_next for info, _ in seen] == edm(4)[1:].tolist()
    assert [info.progress for info, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(result.denoised.shape == X.shape for _, result in seen)


def test_a_guidance_that_gives_a_direction_is_followed():
    """x' = alpha' D + s' (x - alpha D_dir) / s: the direction replaces D in n_hat only."""

    def denoise(info):
        return Result(torch.full_like(info.x, 0.25), torch.full_like(info.x, -1.0))

    for path in (VE, VP, FLOW):
        (a0, s0), (a1, s1) = path(2.0), path(0.5)
        for name in ("euler", "ddim"):
            out = sample(denoise, X, torch.tensor([2.0, 0.5]), name, path)
            torch.testing.assert_close(out, a1 * 0.25 + s1 * (X + a0) / s0)


def test_a_plug_in_is_one_function():
    @register("test_halving", order=1, grid="edm", strength=1.0)
    def halving(step, x, memory, strength):
        """Half the state, whatever the network says."""
        return strength * x / 2, memory

    try:
        assert isinstance(find_sampler("test_halving(strength=2)"), Sampler)
        assert torch.equal(solve(Gaussians(), X, edm(3), "test_halving"), X / 8)
        assert SAMPLERS["test_halving"].doc == "Half the state, whatever the network says."
    finally:
        del SAMPLERS["test_halving"]
