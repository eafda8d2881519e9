"""Every answer of the golden files for the metrics that are here, at the tolerance it is known to."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval.metrics import METRICS, Pair, Sample
from genkit_eval.metrics.cmmd import SCALE, kernel
from genkit_eval.metrics.colour import clipped, contrast, saturation
from genkit_eval.metrics.frechet import frechet_distance, gaussian_of
from genkit_eval.metrics.frechet_infinity import frechet_infinity
from genkit_eval.metrics.inception_score import consecutive_splits, equal_splits, split_scores
from genkit_eval.metrics.kernels import ones, row_means, weighted_sum
from genkit_eval.metrics.kid import cubic_kernel, kid_subsets
from genkit_eval.metrics.manifold import manifold
from genkit_eval.metrics.manifold_adm import adm_precision_recall
from genkit_eval.metrics.moments import Moments
from genkit_eval.metrics.vendi import gram, vendi
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"
COLOUR: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())["colour"]
ANSWERS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "features").glob("*.json"))}
TF = "torch-fidelity 0.4.0"


@cache
def arrays(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / "features" / f"{case}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@cache
def golden_pair(case: str) -> Pair:
    real, fake = (Sample(arrays(case)[key]) for key in ("real", "fake"))
    return Pair(real, fake, train=real)


def having(*keys: str) -> list[str]:
    def holds(answer: Any) -> bool:
        for key in keys:
            answer = answer.get(key, {})
        return bool(answer)

    return [case for case, answer in ANSWERS.items() if holds(answer)]


@pytest.mark.parametrize("case", having("fid"))
def test_frechet(case: str) -> None:
    expected = ANSWERS[case]["fid"]["reference_nuclear_norm_float64"]
    assert METRICS["frechet"].value(golden_pair(case)) == pytest.approx(max(expected, 0.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", having("fid"))
def test_frechet_of_moments_alone(case: str) -> None:
    """From mean and covariance: 1e-9 where images outnumber dimensions, else what a singular covariance leaves."""
    real, fake = (arrays(case)[key].double() for key in ("real", "fake"))
    found = frechet_distance(*(Moments.from_cov(len(x), x.mean(0), torch.cov(x.T)) for x in (real, fake)))
    expected = ANSWERS[case]["fid"]["reference_nuclear_norm_float64"]
    enough = min(len(real), len(fake)) > real.shape[1]
    assert found == pytest.approx(max(expected, 0.0), rel=1e-9 if enough else 2e-5, abs=1e-12)


@pytest.mark.parametrize("case", having("kid"))
def test_kid(case: str) -> None:
    pair = golden_pair(case)
    some = pair.real.features[:50].double()
    expected = ANSWERS[case]["kid"]["reference_unbiased_full_float64"]
    assert METRICS["kid"].value(pair) == pytest.approx(expected, abs=1e-9 * float(cubic_kernel(some, some).abs().max()))


@pytest.mark.parametrize("case", having("kid"))
def test_kid_on_subsets(case: str) -> None:
    """The same subsets as torch-fidelity in float64; its float32 run differs by rounding, and by all where means are large."""
    answer, data = ANSWERS[case]["kid"], arrays(case)
    params = answer["params"]
    found = kid_subsets(data["real"], data["fake"], params["subsets"], params["subset_size"], params["rng_seed"])
    exact, single = answer[f"{TF} float64 features"], answer[f"{TF} (input1=fake,input2=real)"]
    assert found.mean == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(exact["kernel_inception_distance_std"], rel=1e-8)
    if case not in ("offset_mean100", "rectified512_n_lt_d"):
        assert found.mean == pytest.approx(single["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("sign", ["le", "lt"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("case", having("prdc"))
def test_manifold(case: str, k: int, sign: str) -> None:
    found = manifold(golden_pair(case), k, strict=sign == "lt")
    for name, expected in ANSWERS[case]["prdc"][f"k={k}"]["reference_float64"][sign].items():
        assert float(getattr(found, name).mean()) == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("case", having("precision_recall_tensorflow"))
def test_manifold_of_adm(case: str, k: int) -> None:
    """What TensorFlow prints, +-0.005: it rounds sums in an order of its own. Overflow sends it back to float32, as published."""
    answer, data = ANSWERS[case]["precision_recall_tensorflow"][f"k={k}"], arrays(case)
    for scale, key, tolerance in (
        (1, "ADM ManifoldEstimator (TF 2.21.0 CPU, <=, float16 first)", 0.005),
        (4096, "ADM ManifoldEstimator, features x 4096 (its own float32 fallback)", 1e-12),
    ):
        if scale > 1 and case == "fd_infinity_3000":
            continue  # large, and of one kind with others
        found = adm_precision_recall(data["real"] * scale, data["fake"] * scale, k)
        for values, name in zip(found, ("precision", "recall"), strict=True):
            assert float(values.mean()) == pytest.approx(answer[key][name], abs=tolerance), (key, name)


@pytest.mark.parametrize("case", having("inception_score"))
def test_inception_score(case: str) -> None:
    logits, answers = arrays(case)["logits"], ANSWERS[case]["inception_score"]
    checked = 0
    for splits, shuffle in ((10, True), (10, False), (1, False)):
        found = split_scores(logits, equal_splits(len(logits), splits, 2020 if shuffle else None))[0]
        expected = answers[f"{TF} splits={splits} shuffle={shuffle} seed=2020"]
        assert float(found.mean()) == pytest.approx(expected["inception_score_mean"], rel=1e-12)
        assert float(found.std(correction=0)) == pytest.approx(expected["inception_score_std"], abs=1e-12)
    for key, expected in answers.items():
        if key.startswith("ADM"):
            size = int(key.split("split_size=")[1].split()[0])
            found = split_scores(logits, consecutive_splits(len(logits), size))[0].mean()
            # Where a softmax underflows the peer says NaN; elsewhere it has float32's digits.
            assert math.isfinite(found)
            checked += expected != "nan"
            assert expected == "nan" or float(found) == pytest.approx(expected, rel=1e-6)
    assert checked == (0 if case == "logits_underflow" else 2)


@pytest.mark.parametrize("case", having("misc"))
class TestOthers:
    def test_vendi(self, case: str) -> None:
        fake, answers = arrays(case)["fake"], ANSWERS[case]["misc"]
        for q in ("1", "2", "inf"):
            found = vendi(gram(fake), len(fake), float(q))
            assert found == pytest.approx(answers[f"dgm-eval vendi linear normalize q={q}"], rel=1e-9)

    def test_cmmd(self, case: str) -> None:
        """On the rows that the peer scaled in float32 to 1e-9; scaled in float64 they are others by as much as float32 rounds."""
        real, fake = (arrays(case)[key] for key in ("real", "fake"))
        expected = ANSWERS[case]["misc"]["cmmd-pytorch mmd (L2-normalised float64 rows)"]
        x, y = (torch.from_numpy(v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True)) for v in (real, fake))
        inner = sum(float(weighted_sum(kernel, rows, ones(rows), diagonal=True)) / len(rows) ** 2 for rows in (x, y))
        assert SCALE * (inner - 2 * float(row_means(kernel, y, x).mean())) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        pair = Pair(Sample(None, layers={"clip": real}), Sample(None, layers={"clip": fake}))
        assert METRICS["cmmd"].value(pair) == pytest.approx(expected, rel=2e-8, abs=1e-12)

    def test_sliced_wasserstein_approximation(self, case: str) -> None:
        found = METRICS["sliced_wasserstein_gaussian"].value(golden_pair(case))
        assert found == pytest.approx(ANSWERS[case]["misc"]["dgm-eval sw_approx"], rel=1e-9, abs=1e-12)

    def test_authenticity(self, case: str) -> None:
        expected = ANSWERS[case]["misc"]["dgm-eval authpct (real=train)"]
        assert METRICS["authpct"].value(golden_pair(case)) == pytest.approx(expected, rel=1e-6)

    def test_frechet_infinity(self, case: str) -> None:
        """One subset a size from numpy's default generator with seed 0; the peer's square root is off where images are few."""
        pair = golden_pair(case)
        found = frechet_infinity(gaussian_of(pair.real), pair.fake.features, repeats=1, seed=0).value
        few = min(len(pair.real), len(pair.fake)) // 10 <= (pair.fake.width or 0)
        expected = ANSWERS[case]["misc"]["dgm-eval FD_infinity 15 points, default_rng(0)"]
        assert found == pytest.approx(expected, rel=2e-6 if few else 1e-9, abs=1e-8)


@pytest.mark.parametrize("name", sorted(COLOUR))
def test_colour(name: str) -> None:
    pixels = torch.from_numpy(np.array(Image.open(GOLDEN / "colour" / name).convert("RGB"))).permute(2, 0, 1)[None]
    for function in (saturation, contrast, clipped):
        assert float(function(pixels)) == pytest.approx(COLOUR[name][function.__name__], abs=1e-12)
