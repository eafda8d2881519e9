"""The built-in model: same seed, same image, in any batch and at any time."""

import pytest
import torch

import genkit

CLASSES = [3, "ship", 0, 9, 4, 7, 1, 6]
SEEDS = [0, 1, 2, 123456789, 4, 4, 2**62, 7]
ADAPTIVE = "Adaptive(CFG(3.0), 0.98, measure='x0')"


@pytest.fixture(scope="module")
def pipe():
    return genkit.load("builtin/cifar10")


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance"),
    [
        ("heun", 18, "Interval(APG(4.0), 0.28, 5.42)"),
        ("dpmpp_2m", 10, "CFG(3.0)"),
        ("euler_ancestral", 6, ADAPTIVE),
    ],
)
def test_same_seed_same_image(pipe, sampler, steps, guidance):
    def run(size, classes=CLASSES, seeds=SEEDS):
        return pipe(classes, seeds, guidance, sampler=sampler, steps=steps, batch_size=size)

    whole = run(8)
    assert whole.latents.isfinite().all()
    assert whole.latents.std() > 0.1
    if guidance == ADAPTIVE:  # else no partly evaluated branch was tried
        assert len(set(whole.nfe)) > 1
    for size in (1, 3):
        parts = run(size)
        difference = (parts.latents - whole.latents).abs().max().item()
        assert difference <= 1e-5, f"batch size {size}: images differ by {difference:.2e}"
        assert parts.nfe == whole.nfe


def test_the_rest_of_the_batch_does_not_matter(pipe):
    def run(classes, seeds):
        return pipe(classes, seeds, "CFG(3.0)", sampler="euler_ancestral", steps=4).latents

    whole = run(CLASSES, SEEDS)
    assert (run(CLASSES[:3][::-1], SEEDS[:3][::-1]).flip(0) - whole[:3]).abs().max() <= 1e-5


def test_a_fresh_pipeline_repeats_bit_for_bit(pipe):
    arguments = (["ship", 5], [10, 11], "CFG(2.0)")
    first = pipe(*arguments, sampler="heun(churn=10)", steps=4).latents
    pipe(0, 99, sampler="ddim(eta=1)", steps=2)
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(genkit.load("builtin/cifar10")(*arguments, sampler="heun(churn=10)", steps=4).latents, first)
