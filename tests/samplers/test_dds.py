"""Linear measurements: adjoints, conjugate gradients, and DDS against its golden runs and what it claims."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.denoiser import Guided
from genkit.guidance import CFG, NoGuidance
from genkit.guidance.base import Result
from genkit.noise import VE, VP, karras
from genkit.random import Fixed, Gaussian
from genkit.samplers import sample
from genkit.samplers.diffusion.dds import DDS, DataConsistency
from genkit.samplers.operators import BoxDownsampling, GaussianBlur, MaskedFFT, Masking, conjugate_gradients
from tests.gaussians import Gaussians
from tests.toys import step_info

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"


def golden(name):
    with np.load(GOLDEN / f"dds_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- conjugate gradients ----


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 30])
def test_iterations_are_the_golden_ones(steps):
    g = golden("cg")
    found = conjugate_gradients(lambda x: x @ g["A"], g["b"][None], g["x0"][None], steps, tolerance=1e-5)
    torch.testing.assert_close(found[0], g[f"x_{steps}"], rtol=1e-9, atol=1e-9)


def test_samples_are_systems_of_their_own():
    g = golden("cg")
    found = conjugate_gradients(lambda x: x @ g["A"], g["batch_b"], torch.zeros(2, 10, dtype=torch.float64), 3)
    torch.testing.assert_close(found, g["single_x_3"], rtol=1e-9, atol=1e-9)
    assert (found - g["batch_x_3"]).abs().max() > 1e-3  # one system for all samples would be something else


def test_a_start_at_the_solution_stays():
    g = golden("cg")
    start = torch.stack([g["exact"], torch.zeros(10, dtype=torch.float64)])
    right = torch.stack([g["exact"] @ g["A"], torch.zeros(10, dtype=torch.float64)])
    found = conjugate_gradients(lambda x: x @ g["A"], right, start, 40)
    torch.testing.assert_close(found, start, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        conjugate_gradients(lambda x: x @ g["A"], g["b"][None], g["x0"][None], 200)[0], g["exact"], rtol=1e-9, atol=1e-9
    )
    seen_nothing = conjugate_gradients(lambda x: 0 * x, right, start, 3)
    assert torch.equal(seen_nothing, start)


@pytest.mark.parametrize("steps", [1, 3, 5, 20])
def test_complex_unknowns(steps):
    g = golden("mri_operator")
    op, gamma = MaskedFFT(g["mask"], g["sens"]), float(g["gamma"])
    torch.testing.assert_close(op.A(g["x"]), g["y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(op.AT(g["y"]), g["Aty"], rtol=1e-4, atol=1e-5)
    found = conjugate_gradients(lambda x: x + gamma * op.AT(op.A(x)), g["cg_rhs"], g["cg_init"], steps)
    torch.testing.assert_close(found, g[f"cg_hermitian_{steps}"], rtol=1e-4, atol=2e-5)
    if steps == 20:
        torch.testing.assert_close(found, g["exact"], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_solver():
    matrix = randn(4, 4)
    matrix = matrix @ matrix.T + torch.eye(4)
    right = randn(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: conjugate_gradients(lambda x: x @ matrix, b, torch.zeros_like(b), 3), (right,))


# ---- operators ----

MASK = (randn(1, 1, 8, 12) > 0).double()
SENS = torch.complex(randn(1, 3, 8, 12, seed=4), randn(1, 3, 8, 12, seed=5))
OPERATORS = [Masking(MASK), BoxDownsampling(4), GaussianBlur(0.8), MaskedFFT(MASK), MaskedFFT(MASK, SENS)]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: type(op).__name__)
def test_adjoints(op):
    """<A x, y> = <x, AT y>."""
    x = randn(2, 1, 8, 12, seed=1)
    if isinstance(op, MaskedFFT):
        x = torch.complex(x, randn(2, 1, 8, 12, seed=6))
    ax = op.A(x)
    y = torch.complex(randn(*ax.shape, seed=2), randn(*ax.shape, seed=3)) if ax.is_complex() else randn(*ax.shape, seed=2)
    assert op.AT(y).shape == x.shape
    for i in range(2):
        left, right = (ax[i].conj() * y[i]).sum(), (x[i].conj() * op.AT(y)[i]).sum()
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_what_operators_measure():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(BoxDownsampling(2).A(x), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    point = torch.zeros(1, 2, 11, 11, dtype=torch.float64)
    point[0, 0, 5, 5] = 1
    blurred = GaussianBlur(1.0).A(point)
    assert blurred[0, 1].abs().max() == 0
    assert blurred.sum().item() == pytest.approx(1)
    assert (blurred[0, 0, 5, 7] / blurred[0, 0, 5, 5]).item() == pytest.approx(math.exp(-2))
    torch.testing.assert_close(blurred[0, 0], blurred[0, 0].T)
    flat = torch.ones(1, 1, 4, 6, dtype=torch.complex128)
    spectrum = MaskedFFT(torch.ones(4, 6)).A(flat)
    assert spectrum[0, 0, 2, 3].real == pytest.approx(math.sqrt(24))  # the zero frequency is in the middle
    assert spectrum.abs().sum() == pytest.approx(math.sqrt(24))
    with pytest.raises(ValueError, match="factor=3 does not divide an image of 4 x 4"):
        BoxDownsampling(3).A(x)
    with pytest.raises(ValueError, match=r"sigma=2\.0: the kernel is wider than an image of 4 x 4"):
        GaussianBlur(2.0).A(x)


# ---- golden runs ----


class Dense:
    def __init__(self, matrix):
        self.matrix = matrix

    def A(self, x):
        return x.flatten(1) @ self.matrix.T.to(x)

    def AT(self, y):
        return (y @ self.matrix.to(y)).reshape(-1, 1, 4, 4)


@pytest.mark.parametrize("name", ["noiseless", "noisy"])
def test_golden_runs(name):
    g = golden(f"sampler_{name}")
    mean, variance = g["prior_mean"].double(), float(g["prior_var"])
    levels = ((1 - g["alphas_cumprod"].double()) / g["alphas_cumprod"].double()).sqrt()[g["t"]]
    seen, moved = [], []

    def model(info):
        """The exact denoiser of N(prior_mean, prior_var I)."""
        noise = info.s**2
        d = mean + info.alpha * variance * (info.x - info.alpha * mean) / (info.alpha**2 * variance + noise)
        seen.append((info.x, d))
        return Result(d)

    run = DataConsistency(
        model, Dense(g["A"].double()), g["y"].double(), float(g["gamma"]) if name == "noisy" else None, int(g["cg_iter"])
    )

    def denoise(info):
        result = run(info)
        moved.append(result.denoised)
        return result

    assert g["t"][-1] == 0
    # The published loop leaves out the noise of the step to index 0, and calls the model once more there.
    grid = torch.cat([levels[:-1], levels.new_zeros(1)])
    x = sample(denoise, g["x_T"].double(), grid, DDS(eta=float(g["eta"])), VP, Fixed(g["noise"]))
    final = denoise(step_info(x, sigma=float(levels[-1]), path=VP)).denoised

    def near(found, expected):
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)

    near(torch.cat([x for x, _ in seen]), g["x_t"])
    near(torch.cat([d for _, d in seen]), g["x0"])
    near(torch.cat(moved), g["x0_hat"])
    near(final, g["final"])
    near((seen[3][0] - VP(float(levels[3]))[0] * seen[3][1]) / VP(float(levels[3]))[1], g["eps"][3:4])


# ---- what it is for ----


def test_below_the_pseudo_inverse():
    """12 noisy measurements of 32 values with 6 strong directions: better than pinv and than none, not the posterior."""
    n, strong, count, batch, noise_std = 32, 6, 12, 200, 0.01
    q = torch.linalg.qr(randn(n, n))[0]
    values = torch.full((n,), 0.001, dtype=torch.float64)
    values[:strong] = 1.0
    root = q * values.sqrt()
    cov = root @ root.T
    matrix = randn(count, n, seed=1)
    truth = randn(batch, n, seed=2) @ root.T
    y = truth @ matrix.T + noise_std * randn(batch, count, seed=3)

    def model(info):
        gain = info.alpha * cov @ torch.linalg.inv(info.alpha**2 * cov + info.s**2 * torch.eye(n))
        return Result(info.x @ gain.T)

    class Op:
        def A(self, x):
            return x @ matrix.T

        def AT(self, y):
            return y @ matrix

    def rmse(x):
        return (x - truth).square().mean().sqrt().item()

    grid = karras(50, 0.01, 80.0)
    start = VP(80.0)[1] * randn(batch, n, seed=4)

    def run(eta):
        return sample(DataConsistency(model, Op(), y, 1.0), start, grid, DDS(eta=eta), VP, Gaussian(range(batch), 1))

    pinv = rmse(y @ torch.linalg.pinv(matrix).T)
    posterior = rmse(y @ torch.linalg.inv(matrix @ cov @ matrix.T + noise_std**2 * torch.eye(count)) @ matrix @ cov)
    free = rmse(sample(model, start, grid, "ddim", VP))
    assert posterior < rmse(run(0.0)) < 0.6 * pinv
    assert rmse(run(0.85)) < 0.6 * pinv
    assert pinv < free


def inpainted(guidance, sampler):
    x = VE(20.0)[1] * randn(3, 1, 2, 4)
    mask = torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 2, 4)
    known = torch.full((3, 1, 2, 4), 0.3, dtype=torch.float64)
    conditions = {"cond": torch.zeros(3, dtype=torch.long), "uncond": torch.ones(3, dtype=torch.long)}
    run = Guided(Gaussians([0.5, 0.0], [0.2, 0.4]), guidance, conditions, 3)
    return sample(DataConsistency(run, Masking(mask), mask * known), x, karras(8, 0.01, 20.0), sampler, VE, Gaussian(range(3), 1))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim(eta=1)", "dpmpp_2m", DDS], ids=str)
def test_any_sampler_takes_it_with_any_guidance(sampler):
    out = inpainted(CFG(2.0), sampler)
    torch.testing.assert_close(out[..., :2], torch.full((3, 1, 2, 2), 0.3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (out[..., 2:] - 0.3).abs().min() > 1e-3
    assert out.isfinite().all()


def test_real_images_of_a_complex_operator_stay_real():
    mask = torch.ones(1, 1, 4, 4)
    truth = randn(1, 1, 4, 4)
    run = DataConsistency(lambda info: Result(torch.zeros_like(info.x)), MaskedFFT(mask), MaskedFFT(mask).A(truth), steps=3)
    found = run(step_info(randn(1, 1, 4, 4, seed=1))).denoised
    assert not found.is_complex()
    torch.testing.assert_close(found, truth)


def test_eta_and_gamma():
    """eta = 0 is DDIM; more than all of the noise is all of it; gamma must be positive."""
    assert torch.equal(inpainted(NoGuidance(), DDS(eta=0)), inpainted(NoGuidance(), "ddim"))
    assert torch.equal(inpainted(NoGuidance(), DDS(eta=1)), inpainted(NoGuidance(), DDS(eta=7)))
    with pytest.raises(ValueError, match="gamma=0: use a positive number"):
        DataConsistency(lambda info: Result(info.x), Masking(MASK), MASK, gamma=0)


@pytest.mark.parametrize("factor", [0, -2, 1.5, True])
def test_a_factor_that_is_none(factor):
    with pytest.raises(ValueError, match="factor="):
        BoxDownsampling(factor)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_a_blur_that_is_none(sigma):
    with pytest.raises(ValueError, match="sigma="):
        GaussianBlur(sigma)


def test_measurements_and_steps_that_do_not_fit():
    run, operator = (lambda info: Result(info.x)), Masking(torch.ones(2))
    for steps in (-3, 2.5):
        with pytest.raises(ValueError, match="steps="):
            DataConsistency(run, operator, torch.zeros(3, 2), steps=steps)
    with pytest.raises(ValueError, match="y has 1 rows, but the batch 3"):
        DataConsistency(run, operator, torch.zeros(1, 2))(step_info(torch.zeros(3, 2)))
