"""Discrete chains, the learned-range step and the variational bound against improved-diffusion."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from genkit.denoiser import Guided
from genkit.guidance import CFG, COND, NoGuidance, parse
from genkit.guidance.base import Result
from genkit.noise import FLOW, VE, VP
from genkit.random import Fixed, Gaussian
from genkit.samplers import sample
from genkit.samplers.diffusion import Step
from genkit.samplers.diffusion.iddpm import LearnedRange, learned_range
from genkit.samplers.diffusion.likelihood import discretized_log_likelihood, nll, normal_kl, prior_term
from genkit.samplers.diffusion.loop import Point, find_sampler
from genkit.samplers.diffusion.process import Process, cosine_betas, linear_betas, spaced
from tests.gaussians import Gaussians, solve

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers"
BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def golden(name):
    with np.load(GOLDEN / f"iddpm_{name}.npz") as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fi" else str(file[key])
            for key in file.files
            if key != "error_cases"
        }


def near(found, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


# ---- chains ----


@pytest.mark.parametrize("steps", [25, 50, 1000, 4000])
@pytest.mark.parametrize("name", BETAS)
def test_schedules(name, steps):
    g, process = golden("schedules"), Process(BETAS[name](steps))
    i = g[f"{name}_{steps}_idx"]
    first, second = process.mean_coefficients
    small, _ = process.log_range
    found = {
        "betas": process.betas, "alphas_cumprod": process.alphas_cumprod, "posterior_variance": process.posterior_variance,
        "posterior_log_variance_clipped": small, "posterior_mean_coef1": first, "posterior_mean_coef2": second,
    }  # fmt: skip
    for key, value in found.items():
        near(value[i], g[f"{name}_{steps}_{key}"], rtol=1e-9, atol=1e-14)
    near(process.alphas_cumprod[-1], g[f"{name}_{steps}_alphas_cumprod_last"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", range(6))
def test_respacing(case):
    g = golden("respace")
    total, sections = int(g[f"case{case}_T"]), g[f"case{case}_sections"]
    kept = spaced(total, sections)
    assert kept == g[f"case{case}_timesteps"].tolist()
    for name, betas in BETAS.items():
        part = Process(betas(total)).respaced(kept)
        near(part.betas, g[f"case{case}_{name}_betas"], rtol=1e-9, atol=1e-12)
        assert part.timesteps.tolist() == kept
        assert part.total == total


@pytest.mark.parametrize("sections", [[], 50, None, "ddimx", "ddim", "ddim0", "a,b", ""])
def test_sections_that_are_none(sections):
    with pytest.raises(ValueError, match="sections="):
        spaced(1000, sections)


@pytest.mark.parametrize("timesteps", [[3, 3], [3, 2], [], [-1, 2], [5, 10]])
def test_a_chain_over_steps_that_do_not_rise(timesteps):
    with pytest.raises(ValueError, match="timesteps="):
        Process(cosine_betas(10)).respaced(timesteps)


def test_respacing_by_numbers_and_errors():
    assert spaced(300, [10, 15, 20]) == spaced(300, "10,15,20")
    assert spaced(10, [1, 1]) == [0, 5]  # one step of a part is its first
    for case in np.load(GOLDEN / "iddpm_respace.npz")["error_cases"]:
        total, sections, outcome = str(case).split("|")
        assert outcome == "ValueError"
        with pytest.raises(ValueError, match="sections="):
            spaced(int(total), sections)
    with pytest.raises(ValueError, match="steps=20: the linear schedule ends at beta = 20 / steps"):
        linear_betas(20)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Process(torch.tensor([0.5, 1.0]))
    one = Process(cosine_betas(1000)).respaced([0])
    assert len(one) == 1
    assert one.log_range[0].isfinite().all()


# ---- one reverse step ----


def step_golden():
    g = golden("p_mean_variance")
    return g, Process(cosine_betas(int(g["T"])))


def clamped(x, clip):
    return x.clamp(-1, 1) if clip else x


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize(
    ("kind", "fraction"), [("FIXED_SMALL", 0.0), ("FIXED_LARGE", 1.0), ("LEARNED_RANGE", None), ("LEARNED", None)]
)
@pytest.mark.parametrize("predicts", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_mean_and_variance(predicts, kind, fraction, clip):
    g, process = step_golden()
    x, t = g["x_t"], g["t"]
    near(process.noised(g["x_start"], g["noise"], t), x)
    output, v = g["model_output"].chunk(2, dim=1)
    key = f"{predicts}_{kind}_clip{clip}"
    if predicts == "PREVIOUS_X":  # the posterior mean solved for x0, and back again
        first, second = (process.at(c, t, x) for c in process.mean_coefficients)
        x0 = (output - second * x) / first
        near(clamped(x0, clip), g[f"{key}_pred_xstart"], rtol=1e-3)
        near(process.posterior_mean(x0, x, t), g[f"{key}_mean"])
    else:
        x0 = clamped(process.denoised(x, output, t) if predicts == "EPSILON" else output, clip)
        near(x0, g[f"{key}_pred_xstart"])
        near(process.posterior_mean(x0, x, t), g[f"{key}_mean"])
    if kind != "LEARNED":  # there the output is the log-variance itself
        found = process.log_variance(t, x, (v + 1) / 2 if fraction is None else fraction)
        near(found, g[f"{key}_log_variance"])
    near(process.posterior_mean(g["x_start"], x, t), g["q_posterior_mean"])
    near(process.log_variance(t, x), g["q_posterior_log_variance"])


class Fake:
    """The recorded output for one row."""

    def __init__(self, output, row):
        self.output, self.row = output, row

    def __call__(self, x, t, condition):
        return self.output[self.row][None].to(x)


def one_step(g, process, row, sampler, clip, up=False, fixed=False):
    """Row ``row`` of the golden step through the sampler of the loop."""
    t = int(g["t"][row])
    model = LearnedRange(Fake(g["model_output"], row), process, clip=bool(clip))
    sigmas = process.sigmas.flip(0).tolist()  # sigma of step t is [t + 1]
    here, there = sigmas[t + 1], sigmas[t + 2] if up else sigmas[t]

    def denoise(info):
        return Result(model(info.x, torch.tensor([info.s / info.alpha]), None))

    step = Step(denoise, VP, (Point(here, *VP(here)), Point(there, *VP(there))), (0, 1), Fixed(g["step_noise"][row][None, None]))
    solver = learned_range(model) if sampler == "learned" else find_sampler(sampler)
    return solver.step(step, g["x_t"][row][None].double(), None, **solver.options)[0][0]


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize(
    ("sampler", "key"),
    [
        ("learned", "LEARNED_RANGE_clip{}_p_sample"),
        ("iddpm", "FIXED_SMALL_clip{}_p_sample"),
        ("iddpm(fraction=1)", "FIXED_LARGE_clip{}_p_sample"),
        ("ddim", "LEARNED_RANGE_clip{}_ddim_eta0.0"),
        ("ddim(eta=0.5)", "LEARNED_RANGE_clip{}_ddim_eta0.5"),
        ("ddim(eta=1)", "LEARNED_RANGE_clip{}_ddim_eta1.0"),
    ],
)
def test_steps_of_the_loop_are_theirs(sampler, key, clip):
    g, process = step_golden()
    found = torch.stack([one_step(g, process, row, sampler, clip) for row in range(4)])
    near(found, g[f"EPSILON_{key.format(clip)}"])


@pytest.mark.parametrize("clip", [0, 1])
def test_ddim_upwards(clip):
    """Encoding: Euler to the next higher level; the last one of their chain has abar = 0 above it."""
    g, process = step_golden()
    for row in range(3):
        near(one_step(g, process, row, "euler", clip, up=True), g[f"EPSILON_LEARNED_RANGE_clip{clip}_ddim_reverse"][row])
    # Above the last step: x0 sqrt(0) + eps sqrt(1), where x0 may be clamped
    model = LearnedRange(Fake(g["model_output"], 3), process, clip=bool(clip))
    x = g["x_t"][3][None].double()
    d = model(x, process.sigmas[:1], None)
    abar = process.alphas_cumprod[-1]
    near(((x - abar.sqrt() * d) / (1 - abar).sqrt())[0], g[f"EPSILON_LEARNED_RANGE_clip{clip}_ddim_reverse"][3])


# ---- a whole respaced run ----


@pytest.mark.parametrize(("ours", "key"), [("learned", "ancestral"), ("ddim", "ddim0"), ("ddim(eta=1)", "ddim1")])
def test_respaced_run(ours, key):
    g = golden("sampling")
    whole = Process(cosine_betas(int(g["T"])))
    part = whole.respaced(spaced(len(whole), g["sections"]))
    assert part.timesteps.tolist() == g["timestep_map"].tolist()
    times, states = [], []

    def network(x, t, condition):
        times.append(float(t[0]))
        abar = whole.alphas_cumprod[round(times[-1] / 10)]
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * g["mu"]) / (abar * g["s2"] + 1 - abar)
        return torch.cat([eps, torch.full_like(eps, 0.2)], 1)

    model = LearnedRange(network, part, rescale=True)
    solver = learned_range(model) if ours == "learned" else find_sampler(ours)
    run = solve_with(model, g["x_T"].double(), part.sigmas, solver, Fixed(g["noise"]), states)
    near(torch.stack([*states[1:], run]), g[f"{key}_samples"], rtol=3e-4, atol=2e-4)
    assert times == pytest.approx(g["model_timesteps"].tolist())


def solve_with(model, x, sigmas, solver, noise, states):
    guided = Guided(model, NoGuidance(), {"cond": None}, len(x))
    return sample(guided, x, sigmas, solver, VP, noise, callback=lambda info, result: states.append(info.x))


def test_the_learned_fraction_is_that_of_the_conditional_rows():
    """With CFG a batch has twice the rows; the first half are the conditional ones."""
    process = Process(cosine_betas(8))

    def network(x, t, condition):
        v = torch.where(condition == 0, -1.0, 5.0)[:, None].to(x).expand(-1, x.shape[1])
        return torch.cat([torch.zeros_like(x), v], 1)

    model = LearnedRange(network, process)
    x, seeds = torch.ones(3, 2, dtype=torch.float64), [0, 1, 2]
    conditions = {"cond": torch.zeros(3, dtype=torch.long), "uncond": torch.ones(3, dtype=torch.long)}
    out = solve(model, x, process.sigmas, learned_range(model), VP, CFG(2.0), conditions, Gaussian(seeds, 1))
    same = solve(model, x, process.sigmas, "euler_ancestral", VP, CFG(2.0), conditions, Gaussian(seeds, 1))
    torch.testing.assert_close(out, same)  # f = 0 there; the other rows would make it wild


@pytest.mark.parametrize("path", [VE, FLOW], ids=lambda p: p.name)
def test_a_score_moves_the_mean_by_the_variance_on_every_path(path):
    process = Process(cosine_betas(8))
    grid, (here, there) = process.sigmas[2:4], process.sigmas[2:4].tolist()
    vp = torch.tensor([[0.3, -1.0]], dtype=torch.float64)

    def moved(path, score):
        ratio = path(here)[0] / VP(here)[0]  # x and its gradient change inversely
        out = sample(lambda info: Result(0 * info.x, score=score / ratio), ratio * vp, grid, "iddpm(fraction=1)", path, quiet)
        return out / path(there)[0] * VP(there)[0]

    quiet, score = Fixed(torch.zeros(1, 1, 2)), torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    want = process.betas[len(process) - 3] * score
    torch.testing.assert_close(moved(VP, score) - moved(VP, 0 * score), want)
    torch.testing.assert_close(moved(path, score) - moved(path, 0 * score), want)


def test_the_learned_fraction_is_that_of_the_step():
    """Not of what a refinement evaluates later, at another level or over some of the rows."""
    process = Process(cosine_betas(8))
    model = LearnedRange(lambda x, t, c: torch.cat([0 * x, (t[:, None] / 4 - 1).to(x).expand_as(x)], 1), process)

    @dataclass(frozen=True)
    class _Later(NoGuidance):
        requires = frozenset({"refine"})

        def refine(self, info, result, run, state):
            s, alpha = VP(2 * info.sigma)[::-1]
            run.evaluate(info._replace(alpha=alpha, s=s), (COND,))
            return result, state

    x, conditions = torch.ones(3, 2, dtype=torch.float64), {"cond": torch.zeros(3, dtype=torch.long)}
    outs = [
        solve(model, x, process.sigmas, learned_range(model), VP, guidance, conditions, Gaussian([0, 1, 2], 1))
        for guidance in (NoGuidance(), _Later())
    ]
    assert torch.equal(*outs)
    assert model.recorded is None


def test_a_step_without_evaluation_has_no_learned_variance():
    process = Process(cosine_betas(8))
    model = LearnedRange(lambda x, t, c: torch.cat([0 * x, 0 * x], 1), process)
    with pytest.raises(ValueError, match="learned_range: the guidance did not evaluate the network over the whole batch"):
        solve(model, torch.ones(1, 2).double(), process.sigmas, learned_range(model), VP, parse("ZeroInit(CFG(3.0))"),
              noise=Gaussian([0], 1))  # fmt: skip


# ---- the bound ----


def test_discretized_likelihood_and_kl():
    g = golden("losses")
    x, mean, log_std = (g[f"dgll_{key}"].double() for key in ("x", "mean", "log_scale"))
    found = discretized_log_likelihood(x, mean, log_std)
    near(found, g["dgll_out_float64"], rtol=1e-6, atol=1e-6)
    near(normal_kl(mean, log_std, x, 0.5 * log_std), g["kl_out"])
    z = g["cdf_in"].double()
    near(torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)), g["cdf_out"], atol=1e-6)


def test_bins_sum_to_one_and_tails_do_not_vanish():
    values = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    for mean, log_std in [(0.2, -1.0), (-0.9, -3.5), (0.0, 1.0)]:
        p = discretized_log_likelihood(
            values, torch.tensor(mean).double().expand(256), torch.full((256,), log_std).double(), floor=0
        )
        assert p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    far = discretized_log_likelihood(
        torch.tensor([0.9]).double(), torch.tensor([0.0]).double(), torch.tensor([-3.0]).double(), floor=0
    )
    assert -3000 < far.item() < math.log(1e-12)  # a difference of two float32 CDFs is 0 here
    near_mode = discretized_log_likelihood(torch.zeros(1).double(), torch.tensor([0.01]).double(), torch.tensor([-3.0]).double())
    width = norm(0.01, math.exp(-3)).cdf(1 / 255) - norm(0.01, math.exp(-3)).cdf(-1 / 255)
    assert near_mode.item() == pytest.approx(math.log(width), abs=2e-3)


def test_prior_term():
    g = golden("losses")
    near(prior_term(Process(cosine_betas(int(g["T"]))), g["x_start"].double()), g["prior_bpd"], rtol=2e-2, atol=1e-9)


def test_whole_bound():
    g = golden("bpd_loop")
    process = Process(cosine_betas(int(g["T"])))
    model = Gaussians([0.0], [float(g["s2"])], VP)  # their eps = sqrt(1 - abar) x / (abar s2 + 1 - abar)
    found = nll(model, g["x_start"], process, Fixed(g["step_noise"]), torch.zeros(4, dtype=torch.long), fraction=0.5)
    near(found.terms, g["vb"], rtol=1e-4, atol=2e-5)
    near(found.prior, g["prior_bpd"], rtol=2e-2, atol=1e-9)
    near(found.total, g["total_bpd"], rtol=1e-4)

    def network(x, t, condition):
        abar = process.at(process.alphas_cumprod, t, x)
        eps = (1 - abar).sqrt() * x / (abar * float(g["s2"]) + 1 - abar)
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    learned = LearnedRange(network, process)
    again = nll(learned, g["x_start"], process, Fixed(g["step_noise"]), fraction=lambda: learned.fraction)
    torch.testing.assert_close(again.terms, found.terms, rtol=1e-9, atol=1e-9)


def test_bound_tends_to_the_entropy_of_gaussian_data():
    """With the exact model, more steps only tighten it; the limit is the entropy of the data in bins of 2/255."""
    std = 0.2
    x0 = torch.randn(8, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std
    x0 = ((x0 + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    # cross-entropy of these very images under the data's law
    truth = -torch.as_tensor(norm(0, std).logpdf(x0.numpy()) + math.log(2 / 255)).mean().item() / math.log(2)
    bounds = []
    for steps in (10, 40, 160):
        noise = Gaussian(range(8), stream=1)
        found = nll(
            Gaussians([0.0], [std**2], VP),
            x0,
            Process(cosine_betas(1000)).respaced(spaced(1000, [steps])),
            noise,
            torch.zeros(8, dtype=torch.long),
            fraction=1.0,
        )
        bounds.append(found.total.mean().item())
    assert bounds[0] > bounds[1] > bounds[2] > truth - 0.02
    assert bounds[2] - truth < 0.05


def test_images_outside_the_range_are_refused():
    with pytest.raises(ValueError, match=r"x0 reaches 255: give images in \[-1, 1\]"):
        nll(Gaussians(), torch.full((1, 1), 255.0), Process(cosine_betas(4)), Gaussian([0]))
