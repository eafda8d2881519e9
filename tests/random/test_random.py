"""Noise sources: a row belongs to its seed, streams are independent, laws are right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from genkit.random import MAX_SEED, Fixed, Gaussian, StudentT, check_seeds, generator

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"
SOURCES = {
    "gaussian": lambda seeds, **k: Gaussian(seeds, **k),
    "student_t": lambda seeds, **k: StudentT(seeds, 4.0, **k),
}


@pytest.fixture(params=SOURCES, ids=str)
def source(request):
    return SOURCES[request.param]


def like(rows, dtype=torch.float32):
    return torch.empty(rows, 3, 5, dtype=dtype)


def test_a_row_does_not_depend_on_its_batch(source):
    seeds = [7, 0, MAX_SEED, 3]
    whole = source(seeds)
    alone = [source([seed]) for seed in seeds]
    swapped = source(seeds[::-1])
    for step in range(3):
        rows = whole(like(4), step)
        assert torch.equal(rows, torch.cat([one(like(1), step) for one in alone]))
        assert torch.equal(rows.flip(0), swapped(like(4), step))


def test_the_numbers_are_the_same_in_every_dtype(source):
    # Student-t divides in the dtype asked for: equal to float32 rounding.
    torch.testing.assert_close(source([1, 2])(like(2)).double(), source([1, 2])(like(2, torch.float64)), rtol=1e-6, atol=0)
    assert source([1])(like(1, torch.float64)).dtype == torch.float64


def test_seeds_streams_and_steps_are_independent(source):
    first, second, other = source([0]), source([0], stream=1), source([1])
    draws = [s(torch.empty(1, 20000), k).flatten() for k, s in enumerate((first, first, second, other))]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
            assert abs(np.corrcoef(a.abs(), b.abs())[0, 1]) < 0.05


def test_streams_are_not_neighbouring_seeds():
    assert generator(0, 1).initial_seed() != generator(1, 0).initial_seed()
    assert len({generator(seed, stream).initial_seed() for seed in range(40) for stream in range(40)}) == 1600


def test_the_global_generators_are_left_alone(source):
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = source([5])(like(1))
    torch.manual_seed(99)
    assert torch.equal(first, source([5])(like(1)))
    torch.set_rng_state(before)
    source([5])(like(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


def test_gaussian_law():
    z = Gaussian(range(20))(torch.empty(20, 1000)).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    across_seeds = Gaussian(range(4000))(torch.empty(4000, 1)).flatten().numpy()
    assert stats.kstest(across_seeds, "norm").pvalue > 1e-3


@pytest.mark.parametrize("degrees", [1, 3, 8])
def test_student_t_marginals(degrees):
    draws = StudentT(range(4000), degrees)(torch.empty(4000, 2)).numpy()
    for column in draws.T:
        assert stats.kstest(column, "t", args=(degrees,)).pvalue > 1e-3
        if degrees <= 3:  # 4000 draws do not tell t(8) from a normal law
            assert stats.kstest(column, "norm").pvalue < 1e-3


@pytest.mark.parametrize("degrees", [1, 32, 2048])
def test_student_t_radius_is_that_of_pfgmpp(degrees):
    """The norm over N = 12 dimensions: one chi2 per sample, not one per element."""
    golden = np.load(GOLDEN / "pfgmpp_kernel_radius.npz")
    n = int(golden["N"])
    radius = StudentT(range(4000), degrees)(torch.empty(4000, n)).norm(dim=1).double().numpy()
    below = [(radius <= theory).mean() for theory in golden[f"D{degrees}_theory_q"]]
    assert below == pytest.approx(golden["q"], abs=0.035)  # about four standard errors of a median
    assert stats.kstest(radius**2 / degrees, "betaprime", args=(n / 2, degrees / 2)).pvalue > 1e-3


def test_infinite_degrees_are_gaussian_noise():
    assert torch.equal(StudentT([3, 4], float("inf"))(like(2)), Gaussian([3, 4])(like(2)))


def test_fixed_noise_replays_its_values():
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    out = Fixed(values)(torch.empty(3, 4, dtype=torch.float64), 1)
    assert out.dtype == torch.float64
    assert torch.equal(out, values[1].double())


@pytest.mark.parametrize("bad", [-1, 2**63, 1.0, True, "1", None])
def test_bad_seeds_are_named(bad):
    with pytest.raises(ValueError, match=r"seeds contains .*integer from 0 to 2\*\*63 - 1"):
        check_seeds([0, bad])
    with pytest.raises(ValueError, match="seeds contains"):
        Gaussian([bad])


def test_numpy_seeds_are_integers():
    assert check_seeds(np.arange(3)) == [0, 1, 2]


@pytest.mark.parametrize("degrees", [0, -1, float("nan")])
def test_student_t_needs_positive_degrees(degrees):
    with pytest.raises(ValueError, match="degrees="):
        StudentT([0], degrees)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_another_size_is_refused(source, rows):
    """One row of noise would otherwise be broadcast: every image of the batch from the same noise."""
    with pytest.raises(ValueError, match=rf"2 seeds.*batch of {rows}"):
        source([0, 1])(like(rows))
