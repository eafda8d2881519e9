"""Metrics against golden vectors, closed forms and laws that hold for every entry of the registry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval.metrics import METRICS, Pair, Sample, Spec, register
from genkit_eval.metrics.colour import clipped, contrast, saturation
from genkit_eval.metrics.counts import Counts, draw_counts, interval
from genkit_eval.metrics.frechet import frechet_distance
from genkit_eval.metrics.kid import cubic_kernel
from genkit_eval.metrics.manifold import manifold
from genkit_eval.metrics.moments import Moments, moments_of
from genkit_eval.metrics.pairwise import Distances, nearest_squared
from genkit_eval.torchmetric import RegisteredMetric
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
SPECS = [pytest.param(spec, id=name) for name, spec in sorted(METRICS.items())]


def golden_pair(case: str) -> Pair:
    with np.load(GOLDEN / f"{case}.npz") as data:
        return Pair(Sample(torch.from_numpy(data["real"])), Sample(torch.from_numpy(data["fake"])))


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def images(n: int, seed: int) -> Tensor:
    return torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_pair(n: int = 90, m: int = 120, d: int = 6) -> Pair:
    return Pair(Sample(normal(m, d, 1)), Sample(normal(n, d, 2, 0.3), images(n, 3)))


@pytest.mark.parametrize("case", CASES)
def test_frechet_golden(case: str) -> None:
    expected = EXPECTED[case]["fid"]
    assert METRICS["frechet"].value(golden_pair(case)) == pytest.approx(max(expected, 0.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if EXPECTED[c].get("kid") is not None])
def test_kid_golden(case: str) -> None:
    pair = golden_pair(case)
    scale = float(cubic_kernel(pair.real.features[:50], pair.real.features[:50]).abs().max())
    assert METRICS["kid"].value(pair) == pytest.approx(EXPECTED[case]["kid"], abs=1e-9 * scale)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("case", CASES)
def test_manifold_golden(case: str, k: int) -> None:
    found = manifold(golden_pair(case), k)
    for name, expected in EXPECTED[case]["prdc"][f"k={k}"].items():
        assert float(getattr(found, name).mean()) == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("name", sorted(EXPECTED["colour"]))
def test_colour_golden(name: str) -> None:
    pixels = torch.from_numpy(np.array(Image.open(GOLDEN / "colour" / name).convert("RGB"))).permute(2, 0, 1)[None]
    for function in (saturation, contrast, clipped):
        assert float(function(pixels)) == pytest.approx(EXPECTED["colour"][name][function.__name__], abs=1e-12)


def test_frechet_of_known_gaussians() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2; one dimension by hand."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.0])
    first = Moments.from_cov(100, torch.zeros(3), torch.diag(s1**2))
    second = Moments.from_cov(77, torch.tensor([1.0, 0.0, 2.0]), torch.diag(s2**2))
    assert frechet_distance(first, second) == pytest.approx(5 + 4 + 0.25, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(5 + 4 + 0.25, rel=1e-12)


def test_frechet_refuses_an_indefinite_covariance() -> None:
    wrong = Moments.from_cov(10, torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="not valid"):
        frechet_distance(wrong, wrong)


def test_moments_merge_like_one_pass_far_from_zero() -> None:
    x = normal(1000, 5, 0) * 1e-3 + 1e4
    for chunk in (1000, 333, 7):
        found = moments_of(x, chunk)
        assert torch.allclose(found.mean, x.mean(0), rtol=1e-14, atol=0)
        assert torch.allclose(found.cov, torch.cov(x.T), rtol=1e-9, atol=1e-18)


def test_nearest_and_membership_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = random_pair()
    before, found = nearest_squared(pair.real.features, 4), manifold(pair, 4)
    direct = torch.cdist(pair.real.features, pair.real.features, compute_mode="donot_use_mm_for_euclid_dist").square()
    assert torch.allclose(before, direct.sort(dim=1).values[:, 1:5], rtol=1e-12)
    monkeypatch.setattr("genkit_eval.metrics.pairwise.TILE_ENTRIES", 500)
    again = manifold(random_pair(), 4)
    assert torch.equal(before, nearest_squared(pair.real.features, 4))
    assert all(torch.equal(getattr(found, name), getattr(again, name)) for name in ("precision", "recall", "density", "coverage"))


def test_equal_distances_count_as_inside() -> None:
    grid = torch.tensor([[0.1, 0.7], [0.2, 0.7], [0.3, 0.7]], dtype=torch.float64)
    squared = Distances(grid, grid)
    tile = squared.tile(slice(0, 3))
    limit = (grid[0] - grid[1]).square().sum().reshape(1, 1)
    assert squared.within(slice(0, 3), tile, limit)[0].tolist() == [True, True, False]


@pytest.mark.parametrize("k", [0, 90])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="k: got"):
        nearest_squared(normal(90, 2, 0), k)


@pytest.mark.parametrize("spec", SPECS)
class TestEveryMetric:
    def test_is_finite_and_within_bounds(self, spec: Spec) -> None:
        assert spec.bounds[0] <= spec.value(random_pair()) <= spec.bounds[1]
        assert "/" in spec.variant
        assert spec.interval_of

    def test_order_of_images_does_not_matter(self, spec: Spec) -> None:
        pair = random_pair()
        order = torch.randperm(len(pair.fake), generator=torch.Generator().manual_seed(5))
        assert pair.fake.pixels is not None
        shuffled = Pair(Sample(pair.real.features.flip(0)), Sample(pair.fake.features[order], pair.fake.pixels[order]))
        assert spec.value(shuffled) == pytest.approx(spec.value(pair), rel=1e-10, abs=1e-12)

    def test_identical_sets(self, spec: Spec) -> None:
        if spec.ideal is None:
            pytest.skip("no value is ideal")
        x = normal(80, 5, 4)
        assert spec.value(Pair(Sample(x), Sample(x, images(80, 0)))) == pytest.approx(spec.ideal, abs=1e-10)

    def test_counting_every_image_once_is_the_value(self, spec: Spec) -> None:
        pair = random_pair()
        ones = Counts(torch.ones(2, len(pair.fake), dtype=torch.float64), torch.ones(2, len(pair.real), dtype=torch.float64))
        assert spec.replicates(pair, ones).tolist() == pytest.approx([spec.value(pair)] * 2, rel=1e-9, abs=1e-12)

    def test_interval_holds_the_value(self, spec: Spec) -> None:
        pair = random_pair()
        value = spec.value(pair)
        low, high = interval(value, spec.replicates(pair, draw_counts(90, 120, 60)), bounds=spec.bounds)
        assert spec.bounds[0] <= low <= value <= high <= spec.bounds[1]

    def test_torchmetric_is_the_same_number(self, spec: Spec) -> None:
        pair = random_pair()
        metric = RegisteredMetric(spec.name, pair.real)
        source = pair.fake.features if spec.source == "features" else pair.fake.pixels
        assert source is not None
        for batch in source.split(32):
            metric.update(batch)
        assert float(metric.compute()) == pytest.approx(spec.value(pair), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", [n for n in METRICS if n not in ("kid",) and METRICS[n].source == "features"])
def test_distances_ignore_a_common_shift(name: str) -> None:
    pair = random_pair()
    moved = Pair(Sample(pair.real.features + 512.0), Sample(pair.fake.features + 512.0, pair.fake.pixels))
    assert METRICS[name].value(moved) == pytest.approx(METRICS[name].value(pair), rel=1e-7)


def test_frechet_interval_covers_the_expectation_about_as_often_as_it_says() -> None:
    """200 repetitions give the expectation at N = 120; a 90 % interval from each of 40 others should hold it."""
    reference = Sample(normal(300, 3, 0))
    spec = METRICS["frechet"]

    def fake(seed: int) -> Pair:
        return Pair(reference, Sample(normal(120, 3, 1000 + seed, 0.4) * 1.2))

    expectation = sum(spec.value(fake(i)) for i in range(200)) / 200
    held = 0
    for i in range(40):
        pair = fake(10_000 + i)
        low, high = interval(spec.value(pair), spec.replicates(pair, draw_counts(120, 300, 50, seed=i)), level=0.9)
        held += low <= expectation <= high
    assert 0.75 <= held / 40 <= 1.0


@pytest.mark.parametrize("name", ["recall", "coverage"])
def test_intervals_hold_the_spread_of_the_generated_sample(name: str) -> None:
    """Many real images leave the noise to the generated ones, whose spread over 24 sets the replicates should have."""
    reference, spec = Sample(normal(3000, 4, 0)), METRICS[name]
    pairs = [Pair(reference, Sample(normal(120, 4, 500 + i) * 0.9)) for i in range(24)]
    spread = torch.tensor([spec.value(pair) for pair in pairs]).std()
    counts = draw_counts(120, 3000, 60)
    said = torch.stack([spec.replicates(pair, counts).var() for pair in pairs[:8]]).mean().sqrt()
    # The jackknife of a nearest-neighbour count errs on the wide side; without it, recall has 0.34.
    assert 0.75 <= said / spread <= 2.5


def test_resamples_are_shared_and_draw_from_no_global_state() -> None:
    state = torch.random.get_rng_state()
    first, second = draw_counts(50, 70, 8, seed=3), draw_counts(50, 20, 8, seed=3)
    assert torch.equal(first.fake, second.fake)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.fake.sum(dim=1), torch.full((8,), 50.0, dtype=torch.float64))
    assert not torch.equal(first.fake, draw_counts(50, 70, 8, seed=4).fake)


def test_bad_features_name_the_argument() -> None:
    with pytest.raises(ValueError, match="features: 1 of 4 rows hold NaN"):
        Sample(torch.tensor([[1.0], [math.nan], [0.0], [2.0]]))
    with pytest.raises(ValueError, match="features: got shape"):
        Sample(torch.zeros(5))
    with pytest.raises(ValueError, match="one extractor"):
        Pair(Sample(torch.zeros(3, 2)), Sample(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match=r"pixels: got torch\.float32"):
        Sample(torch.zeros(3, 2), torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match="frechet"):
        RegisteredMetric("fid", Sample(torch.zeros(3, 2)))


def test_a_taken_name_needs_the_same_protocol() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="already registered"):
        register(replace(METRICS["kid"], variant="kid/other"))
