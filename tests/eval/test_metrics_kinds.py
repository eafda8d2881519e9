"""What single metrics promise beyond the laws and the golden files."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import METRICS, Pair, Sample, unavailable
from genkit_eval.metrics import frechet as frechet_module
from genkit_eval.metrics.clip_score import clip_scores
from genkit_eval.metrics.counts import Counts, draw_counts, group_of
from genkit_eval.metrics.frechet import frechet, gaussian_of
from genkit_eval.metrics.frechet_infinity import frechet_infinity
from genkit_eval.metrics.inception_score import ADM_SPLIT, consecutive_splits, split_scores, warn_if_sorted
from genkit_eval.metrics.minority import minority_layer
from genkit_eval.metrics.moments import moments_of
from genkit_eval.metrics.sliced import controlled, directions, sliced_wasserstein, wasserstein_squared
from genkit_eval.torchmetric import RegisteredMetric, StreamingFrechet
from torch import Tensor

from tests.eval.test_metrics import images, normal


def test_groups_are_even_and_do_not_follow_the_order() -> None:
    group = group_of(1000, 20)
    assert torch.equal(torch.bincount(group), torch.full((20,), 50))
    halves = torch.bincount(group[:500], minlength=20)  # files sorted into two classes
    assert int(halves.min()) > 10
    assert int(halves.max()) < 40


def test_moments_without_a_part_are_those_of_the_rest() -> None:
    x = normal(300, 4, 0) + 1e3
    found, expected = moments_of(x).without(moments_of(x[:70])), moments_of(x[70:])
    assert found.n == 230
    assert torch.allclose(found.mean, expected.mean, rtol=1e-14)
    assert torch.allclose(found.cov, expected.cov, rtol=1e-9, atol=1e-10)


class TestFrechet:
    def test_jackknife_has_the_spread_of_the_bootstrap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spread: dict[float, list[Tensor]] = {}
        for budget in (math.inf, 0.0):
            monkeypatch.setattr(frechet_module, "BUDGET", budget)
            spread[budget] = [
                METRICS["frechet"].replicates(Pair(Sample(normal(900, 4, 0)), Sample(normal(800, 4, s, 0.3))), counts).std()
                for s in range(1, 7)
                for counts in [draw_counts(800, 900, 200)]
            ]
        assert sum(spread[0.0]) / sum(spread[math.inf]) == pytest.approx(1, abs=0.2)

    def test_interval_of_fewer_images_than_dimensions_has_their_spread(self) -> None:
        """Where a bootstrap would lose more than a third of the rank."""
        real, counts = Sample(normal(400, 30, 0)), draw_counts(60, 400, 100)
        pairs = [Pair(real, Sample(normal(60, 30, s, 0.1) * (1 + 0.3 * normal(60, 1, s + 500)))) for s in range(1, 31)]
        spread = torch.tensor([frechet(pair) for pair in pairs]).std()
        said = torch.stack([METRICS["frechet"].replicates(pair, counts).var() for pair in pairs[:10]]).mean().sqrt()
        assert 0.7 < float(said / spread) < 1.5

    def test_each_layer_has_its_own(self) -> None:
        real, fake = (Sample(normal(90, 3, s), layers={"spatial": normal(90, 5, s + 10)}, layer_moments=None) for s in (1, 2))
        expected = frechet(Pair(Sample(real.layers["spatial"]), Sample(fake.layers["spatial"])))
        assert METRICS["sfid"].value(Pair(real, fake)) == expected != METRICS["frechet"].value(Pair(real, fake))

    def test_reference_of_moments_alone(self) -> None:
        x, y = normal(90, 3, 1), normal(80, 3, 2)
        real = Sample(None, moments=moments_of(x), layer_moments={"spatial": moments_of(x)})
        pair = Pair(real, Sample(y, layers={"spatial": y}))
        for name in ("frechet", "sfid"):
            assert METRICS[name].value(pair) == frechet(Pair(Sample(x), Sample(y)))
            assert METRICS[name].replicates(pair, draw_counts(80, len(real), 5)).shape == (5,)
        assert unavailable(METRICS["frechet"], pair) is None
        reason = unavailable(METRICS["precision"], pair)
        assert reason is not None
        assert "holds only mean and covariance" in reason
        with pytest.raises(ValueError, match="only what was taken over all of them"):
            METRICS["precision"].value(pair)

    def test_infinity_takes_the_bias_away(self) -> None:
        """FD_N of samples of the reference's own law falls as 1 / N towards 0."""
        real = gaussian_of(Sample(normal(60_000, 8, 0)))
        fakes = [normal(1000, 8, s) for s in range(1, 7)]
        raw = [frechet_module.between(real, gaussian_of(Sample(x))) for x in fakes]
        found = [frechet_infinity(real, x) for x in fakes]
        assert abs(sum(f.value for f in found)) < 0.25 * sum(raw)
        assert found[0] == frechet_infinity(real, fakes[0])
        assert found[0].value != frechet_infinity(real, fakes[0], seed=1).value
        assert all(0 < f.standard_error < 0.02 for f in found)
        # More subsets a size: a steadier line.
        values = [[frechet_infinity(real, fakes[0], repeats=r, seed=s).value for s in range(6)] for r in (1, 6)]
        assert torch.tensor(values[1]).std() < torch.tensor(values[0]).std()

    def test_streaming_is_the_distance_of_all_at_once(self) -> None:
        x, y = normal(200, 4, 1) + 1e4, normal(150, 4, 2) + 1e4
        metric = StreamingFrechet(Sample(x))
        for part in y.split(40):
            metric.update(part)
        assert float(metric.compute()) == pytest.approx(frechet(Pair(Sample(x), Sample(y))), rel=1e-9)
        metric.reset()
        metric.update(y[:1])
        with pytest.raises(ValueError, match="at least 2"):
            metric.compute()
        metric.update(torch.full((3, 4), math.nan))
        with pytest.raises(ValueError, match="NaN"):
            metric.compute()


class TestInceptionScore:
    def test_of_known_answers(self) -> None:
        """Sure and different: the number of classes. Sure and alike, or unsure: 1."""
        sure = 1000 * torch.eye(10)[torch.arange(50) % 10]
        for logits, expected in ((sure, 10.0), (sure[:1].expand(50, 10), 1.0), (torch.zeros(50, 10), 1.0)):
            assert split_scores(logits, consecutive_splits(50))[0].tolist() == pytest.approx([expected], rel=1e-12)

    def test_sorted_labels_are_warned_of(self) -> None:
        labels = torch.arange(2 * ADM_SPLIT) * 10 // (2 * ADM_SPLIT)
        logits = 5 * torch.eye(10)[labels]
        with pytest.warns(UserWarning, match="sorted by class"):
            METRICS["inception_score_adm"].value(Pair(Sample(None), Sample(None, layers={"logits": logits}, labels=labels)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_if_sorted(labels.flip(0), ADM_SPLIT)
            warn_if_sorted(labels, 2 * ADM_SPLIT)
            warn_if_sorted(torch.zeros(2 * ADM_SPLIT), ADM_SPLIT)

    def test_too_few_images_for_the_splits(self) -> None:
        pair = Pair(Sample(None), Sample(None, layers={"logits": normal(9, 4, 0)}))
        assert unavailable(METRICS["inception_score"], pair) == "needs at least 40 generated images, not 9"
        with pytest.raises(ValueError, match="leave one empty"):
            METRICS["inception_score"].value(pair)


class TestSliced:
    def test_one_dimension_is_exact_for_any_counts(self) -> None:
        """Against both sets written out to their common multiple."""
        for n, m in ((6, 4), (5, 5), (7, 30), (1, 3)):
            x, y = normal(n, 1, n).T.sort(dim=1).values, normal(m, 1, m + 50, 1.0).T.sort(dim=1).values
            long = x.repeat_interleave(m, dim=1), y.repeat_interleave(n, dim=1)
            assert wasserstein_squared(x, y).item() == pytest.approx((long[0] - long[1]).square().mean().item(), rel=1e-12)

    def test_of_a_shift_is_exact_whatever_the_directions(self) -> None:
        """W along theta is the control variate and a constant: nothing is left to chance."""
        x, gap = normal(50, 6, 0), torch.arange(6.0).double()
        found = sliced_wasserstein(x, x + gap)[0]
        assert found.squared == pytest.approx(float(gap.square().sum()) / 6, rel=1e-9)
        assert found.standard_error < 1e-9

    def test_control_variate_takes_spread_away_and_adds_no_bias(self) -> None:
        x, y = normal(300, 20, 1), 1.2 * normal(200, 20, 2) + torch.linspace(0, 1, 20).double()
        exact = sliced_wasserstein(x, y, seed=99)[0].squared
        with_, without = [], []
        for seed in range(30):
            theta = directions(20, 32, seed)
            values = wasserstein_squared(*((v @ theta.T).T.sort(dim=1).values for v in (y, x)))
            with_.append(controlled(values, theta, y.mean(0) - x.mean(0)).squared)
            without.append(float(values.mean()))
        spread = torch.tensor(with_).std()
        assert spread < 0.5 * torch.tensor(without).std()
        assert abs(sum(with_) / 30 - exact) < 4 * float(spread) / 30**0.5 + 0.01 * exact

    def test_jackknife_has_the_spread_of_the_sample(self) -> None:
        real, spec = Sample(normal(120, 5, 0)), METRICS["sliced_wasserstein"]
        pairs = [Pair(real, Sample(normal(100, 5, s, 0.5))) for s in range(1, 25)]
        spread = torch.tensor([spec.value(pair) for pair in pairs]).std()
        counts = draw_counts(100, 120, 200)
        said = torch.stack([spec.replicates(pair, counts).var() for pair in pairs[:4]]).mean().sqrt()
        assert 0.6 < float(said / spread) < 1.6


def test_vendi_counts_what_is_different() -> None:
    corners = torch.eye(7)[torch.arange(70) % 7]
    assert METRICS["vendi"].value(Pair(Sample(None), Sample(corners))) == pytest.approx(7, rel=1e-12)
    assert METRICS["vendi"].value(Pair(Sample(None), Sample(corners[:1].expand(70, 7)))) == pytest.approx(1, rel=1e-12)


def test_clip_score_is_a_hundred_cosines() -> None:
    image, text = torch.tensor([[1.0, 0], [0, 2], [1, 1], [1, 0]]), torch.tensor([[3.0, 0], [5, 0], [1, 0], [-1, 0]])
    assert clip_scores(image, text).tolist() == pytest.approx([100, 0, 100 / math.sqrt(2), 0])
    with pytest.raises(ValueError, match="one text embedding"):
        clip_scores(image, text[:2])


def test_minority_layer_takes_a_score_of_the_host() -> None:
    pixels, labels = images(10, 0), torch.arange(10)
    seen: list[int] = []

    def score(part: Tensor, their: Tensor, first: int) -> Tensor:
        seen.append(first)
        return their.float() + part.float().mean(dim=(1, 2, 3)) * 0

    layer = minority_layer(score, pixels, labels, batch=4)
    assert seen == [0, 4, 8]
    assert METRICS["minority"].value(Pair(Sample(None), Sample(None, layers={"minority": layer}))) == 4.5
    with pytest.raises(ValueError, match="one for each image"):
        minority_layer(lambda part, their, first: part.new_zeros(3), pixels, labels)


def test_authenticity_needs_the_training_images() -> None:
    x = normal(20, 3, 0)
    assert unavailable(METRICS["authpct"], Pair(Sample(x), Sample(x))) == "needs layer features of the training images"
    with pytest.raises(ValueError, match="training images"):
        METRICS["authpct"].value(Pair(Sample(x), Sample(x)))
    with pytest.raises(ValueError, match="training set has 3 columns"):
        Pair(Sample(None), Sample(normal(20, 4, 0)), train=Sample(x))


def test_kid_of_fewer_images_than_a_subset() -> None:
    pair = Pair(Sample(normal(50, 3, 0)), Sample(normal(60, 3, 1)))
    assert "at least 1,000" in (unavailable(METRICS["kid_subsets"], pair) or "")
    with pytest.raises(ValueError, match="size: got 1000 for 50 real and 60 generated"):
        METRICS["kid_subsets"].value(pair)


def test_fewer_reference_images_than_neighbours() -> None:
    pair = Pair(Sample(normal(5, 3, 0)), Sample(normal(60, 3, 1)))
    assert unavailable(METRICS["coverage"], pair) == "needs at least 6 reference images, not 5"
    assert unavailable(METRICS["recall"], pair) is None
    with pytest.raises(ValueError, match="k: got 5 for 5 images"):
        METRICS["coverage"].value(pair)


def test_variants_and_headings_name_the_protocol() -> None:
    def made(label: str, variant: str, fid: str = "") -> Extractor:
        return Extractor("x", label, "0", "none", lambda pixels: pixels, variant=variant, fid=fid)

    adm, clean = made("Inception", "adm-tf1", "FID"), made("Inception-clean", "clean", "FID-clean")
    dino = made("DINOv2", "dinov2-vit-l-14-edm2")
    expected = {
        "frechet": ("fid/adm-tf1", "fid/clean", "fd/dinov2-vit-l-14-edm2"),
        "sfid": ("sfid/adm-tf1", "sfid/clean", "sfd/dinov2-vit-l-14-edm2"),
        "precision": ("pr/exact/k3/adm-tf1", "pr/exact/k3/clean", "pr/exact/k3/dinov2-vit-l-14-edm2"),
        "recall_adm": ("pr/adm-fp16/k3/10k-50k", "pr/adm-fp16/k3/10k-50k/clean", "pr/adm-fp16/k3/10k-50k/dinov2-vit-l-14-edm2"),
        "saturation": ("saturation/hsv-mean",) * 3,
    }
    for name, variants in expected.items():
        assert tuple(METRICS[name].protocol(extractor, 10_000, 50_000) for extractor in (adm, clean, dino)) == variants
    assert METRICS["precision_adm"].protocol(adm, 1234, 8000) == "pr/adm-fp16/k3/1234-8k"
    assert [METRICS["frechet"].heading(extractor) for extractor in (adm, clean, dino)] == ["FID", "FID-clean", "FD-DINOv2"]
    assert [METRICS[name].heading(adm) for name in ("sfid", "frechet_infinity", "kid")] == ["sFID", "FID ∞", "KID-Inception"]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_numbers_of_two_protocols_have_two_names(name: str) -> None:
    """Whatever the extractor: a metric's name is its own and its extractor's, but for pairs of one protocol."""
    variants = ("adm-tf1", "clean", "x")
    spec, extractors = METRICS[name], [Extractor("x", "X", "0", "none", lambda p: p, variant=v) for v in variants]
    ours = [spec.protocol(extractor, 60, 50) for extractor in extractors]
    assert len(set(ours)) == (1 if spec.source == "pixels" else 3)
    partners = [("precision", "recall"), ("density", "coverage")]
    for other, found in METRICS.items():
        related = {name.split("_")[0], other.split("_")[0]} in [set(pair) for pair in partners]
        if other != name and not related:
            assert not set(ours) & {found.protocol(extractor, 60, 50) for extractor in extractors}, other


def test_layers_of_one_set_have_one_count() -> None:
    with pytest.raises(ValueError, match="one count works"):
        Sample(normal(5, 2, 0), layers={"logits": normal(6, 2, 0)})
    with pytest.raises(ValueError, match="this set has features"):
        Sample(normal(5, 2, 0)).layer("spatial")
    with pytest.raises(ValueError, match="logits: 1 of 5 rows hold NaN"):
        Sample(None, layers={"logits": torch.tensor([[0.0], [1], [2], [math.inf], [4]])})
    assert Sample(normal(5, 2, 0).half()).features.dtype == torch.float32


def test_registered_metric_says_what_it_lacks() -> None:
    metric = RegisteredMetric("clip_score")
    assert metric.inputs == ("clip", "text")
    with pytest.raises(ValueError, match="clip_score lacks text"):
        metric.update({"clip": normal(4, 3, 0)})
    alone = RegisteredMetric("precision")
    alone.update(normal(9, 3, 0))
    with pytest.raises(ValueError, match="precision needs layer features of each reference image"):
        alone.compute()


def test_no_replicates_of_the_noise_without_noise() -> None:
    pair = Pair(Sample(normal(60, 4, 0)), Sample(normal(50, 4, 1)))
    counts = draw_counts(50, 60, 4)
    plain = Counts(counts.fake, counts.real)
    value = METRICS["sliced_wasserstein"].value(pair)
    assert METRICS["sliced_wasserstein"].replicates(pair, plain).tolist() == [value] * 4
