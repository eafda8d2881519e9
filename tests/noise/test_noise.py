"""Conversions between parameterisations, paths and grids against their definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit import noise
from genkit.noise import FLOW, GRIDS, SPACES, VE, VP, edm, exponential, from_x0, karras, to_x0, uniform_t

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"
PATHS = [VE, VP, FLOW]
LEVELS = st.floats(1e-3, 1e3)
SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=20, deadline=None)


def pair(seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))


def truth(space, x0, n, alpha, s):
    """What a perfect network predicts in each space when x = alpha x0 + s n."""
    return {"x0": x0, "eps": n, "v": alpha * n - s * x0, "flow": n - x0}[space]


# ---- paths ----


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@quick
@given(sigma=LEVELS)
def test_a_path_has_the_noise_level_it_was_asked_for(path, sigma):
    alpha, s = path(sigma)
    assert s / alpha == pytest.approx(sigma, rel=1e-14)
    constraint = {"ve": alpha, "vp": alpha**2 + s**2, "flow": alpha + s}[path.name]
    assert constraint == pytest.approx(1, rel=1e-14)


def test_pure_noise_is_a_point_of_vp_and_flow_but_not_of_ve():
    assert VP(math.inf) == FLOW(math.inf) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"sigma=inf .*'vp' or 'flow'"):
        VE(math.inf)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_no_noise_is_a_clean_image(path):
    assert path(0.0) == (1.0, 0.0)


# ---- conversions ----


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("space", SPACES)
@quick
@given(sigma=LEVELS, seed=SEEDS)
def test_conversions_agree_with_the_definitions(space, path, sigma, seed):
    x0, n = pair(seed)
    alpha, s = path(sigma)
    x, prediction = alpha * x0 + s * n, truth(space, x0, n, alpha, s)
    # Rounding grows with s / alpha on the way to x0, and with alpha / s on the way back; v itself is of order s.
    torch.testing.assert_close(to_x0(prediction, x, alpha, s, space), x0, rtol=0, atol=1e-13 * (1 + sigma))
    torch.testing.assert_close(from_x0(x0, x, alpha, s, space), prediction, rtol=0, atol=1e-13 * (1 + sigma + 1 / sigma))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("space", SPACES)
@quick
@given(sigma=LEVELS, seed=SEEDS)
def test_conversions_undo_each_other_for_any_prediction(space, path, sigma, seed):
    x, prediction = pair(seed)
    alpha, s = path(sigma)
    back = from_x0(to_x0(prediction, x, alpha, s, space), x, alpha, s, space)
    torch.testing.assert_close(back, prediction, rtol=0, atol=1e-12 * (1 + sigma + 1 / sigma))


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_pure_noise_converts_in_all_spaces_but_eps(space):
    x0, n = pair(0)
    prediction = truth(space, x0, n, 0.0, 1.0)
    torch.testing.assert_close(to_x0(prediction, n, 0.0, 1.0, space), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(from_x0(x0, n, 0.0, 1.0, space), prediction, rtol=0, atol=1e-15)


def test_conversions_that_do_not_exist_say_so():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"space='eps' .*alpha=0.*'v' or 'flow'"):
        to_x0(x, x, 0.0, 1.0, "eps")
    for space in ("eps", "v", "flow"):
        with pytest.raises(ValueError, match=rf"s=0: .*space='{space}'"):
            from_x0(x, x, 1.0, 0.0, space)
    assert from_x0(x, x, 1.0, 0.0, "x0") is x
    for convert in (to_x0, from_x0):
        with pytest.raises(ValueError, match="space='epsilon': use one of x0, eps, v, flow"):
            convert(x, x, 1.0, 1.0, "epsilon")


def test_conversions_carry_gradients():
    x, prediction = (t.requires_grad_() for t in pair(1))
    for space in SPACES:
        assert torch.autograd.gradcheck(lambda p, y, space=space: to_x0(p, y, 0.6, 0.8, space), (prediction, x))
        assert torch.autograd.gradcheck(lambda p, y, space=space: from_x0(p, y, 0.6, 0.8, space), (prediction, x))


# ---- grids ----


@pytest.mark.parametrize("name", GRIDS)
@quick
@given(steps=st.integers(1, 60), low=st.floats(1e-4, 0.1), high=st.floats(1.0, 200.0))
def test_every_grid_falls_from_sigma_max_to_zero(name, steps, low, high):
    grid = GRIDS[name](steps, low, high)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[0] == high
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_karras_grid_is_equation_5():
    n, low, high, rho = 11, 0.01, 50.0, 5.0
    i = np.arange(n)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(karras(n, low, high, rho)[:-1].numpy(), expected, rtol=1e-13)


def test_edm_grid_is_the_published_one():
    assert torch.equal(edm(18), karras(18, 0.002, 80.0, 7.0))
    levels = np.load(GOLDEN / "pfgmpp_heun.npz")["Dinf_call_sigma"]  # one call at 80, then two at every later level
    np.testing.assert_allclose(edm(18)[:-1].numpy(), levels[::2], rtol=1e-12)


def test_exponential_grid_has_equal_ratios():
    grid = exponential(9, 0.01, 100.0)[:-1]
    assert (grid[1:] / grid[:-1]).numpy() == pytest.approx(np.full(8, 1e-4 ** (1 / 8)), rel=1e-12)


@pytest.mark.parametrize("high", [3.0, 80.0, math.inf])
def test_uniform_t_has_equal_steps_in_flow_time(high):
    grid = uniform_t(10, 0.002, high)
    assert grid[0] == high
    t = torch.where(grid.isinf(), torch.ones_like(grid), grid / (1 + grid))
    expected = np.linspace(1.0 if math.isinf(high) else high / (1 + high), 0, 11)
    np.testing.assert_allclose(t.numpy(), expected, atol=1e-15)


@pytest.mark.parametrize("name", ["karras", "edm", "exponential"])
@pytest.mark.parametrize("levels", [(0.0, 80.0), (2.0, 1.0), (0.1, math.inf), (-1.0, 1.0), (math.nan, 1.0)])
def test_grids_refuse_levels_out_of_order(name, levels):
    with pytest.raises(ValueError, match="use 0 < sigma_min <= sigma_max < inf"):
        GRIDS[name](5, *levels)


def test_grids_refuse_other_nonsense():
    for grid in GRIDS.values():
        with pytest.raises(ValueError, match="steps=0: use at least 1"):
            grid(0, 0.1, 1.0)
    with pytest.raises(ValueError, match="sigma_max=0"):
        uniform_t(5, 0.0, 0.0)


def test_there_is_one_table_of_spaces():
    assert set(SPACES) == {"x0", "eps", "v", "flow"}
    assert noise.Path("vp") == VP
