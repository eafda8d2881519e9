"""The tiled engines against direct computation, where rounding, ties and the cut into tiles could show."""

from __future__ import annotations

import pytest
import torch
from genkit_eval.metrics import Pair, Sample
from genkit_eval.metrics import pairwise as engine
from genkit_eval.metrics.authenticity import authentic
from genkit_eval.metrics.kernels import ones, row_means, weighted_sum
from genkit_eval.metrics.kid import cubic_kernel
from genkit_eval.metrics.manifold import manifold, squared_radii
from genkit_eval.metrics.pairwise import Distances, nearest, within
from torch import Tensor

from tests.eval.test_metrics import normal


def squared(x: Tensor, y: Tensor) -> Tensor:
    """By differences in float64."""
    return (x[:, None].double() - y[None].double()).square().sum(dim=2)


def clustered(n: int, d: int, seed: int) -> Tensor:
    """Tight groups far from zero and from each other, with copies and points on a grid: everything float32 cannot tell apart."""
    g = torch.Generator().manual_seed(seed)
    centres = 300 * torch.randn(4, d, generator=torch.Generator().manual_seed(0)) + 1000
    x = centres[torch.randint(4, (n,), generator=g)] + 0.05 * torch.randn(n, d, generator=g)
    x[: n // 4] = (x[: n // 4] * 8).round() / 8
    x[n // 2 : n // 2 + 9] = x[0]
    return x


SETS = {
    "normal": (normal(130, 6, 1).float(), normal(90, 6, 2, 0.3).float()),
    "clustered": (clustered(150, 8, 3), clustered(120, 8, 4)),
    "grid": tuple(torch.randint(0, 3, (n, 4), generator=torch.Generator().manual_seed(n)).float() for n in (140, 110)),
    "float64": (normal(60, 3, 5), normal(50, 3, 6)),
    "outlier": (torch.cat([normal(100, 5, 7), torch.full((1, 5), 1e6)]).float(), normal(80, 5, 8).float()),
}


@pytest.fixture(params=[17, 64, 2048])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(engine, "STEP", request.param)
    return int(request.param)


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("name", SETS)
class TestNearest:
    @pytest.mark.parametrize("k", [1, 4])
    def test_others_of_one_set(self, name: str, k: int) -> None:
        x = SETS[name][0]
        found, index = nearest(x, k=k)
        direct = squared(x, x).fill_diagonal_(torch.inf)
        assert torch.equal(found, direct.sort(dim=1).values[:, :k])
        assert torch.equal(found, direct.gather(1, index))

    def test_in_another_set(self, name: str) -> None:
        x, y = SETS[name]
        found, index = nearest(x, y, k=3)
        assert torch.equal(found, squared(x, y).sort(dim=1).values[:, :3])
        assert torch.equal(found, squared(x, y).gather(1, index))


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("many", [0, 2**14])
@pytest.mark.parametrize("name", SETS)
def test_membership_is_exact(name: str, many: int, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tiles are taken again in float64 (``many`` = 0)."""
    monkeypatch.setattr(engine, "MANY", many)
    x, y = SETS[name]
    direct = squared(x, y)
    rows, columns = direct.sort(dim=1).values[:, [2, 6]], direct.sort(dim=0).values[3, :, None]
    found = {"rows": torch.zeros(*direct.shape, 2).bool(), "columns": torch.zeros(*direct.shape, 1).bool()}
    for axis, i, j, inside in within(x, y, rows, columns, strict):
        found[axis][i, j] = inside
    compare = torch.lt if strict else torch.le
    assert torch.equal(found["rows"], compare(direct[:, :, None], rows[:, None]))
    assert torch.equal(found["columns"], compare(direct[:, :, None], columns[None]))


@pytest.mark.parametrize("name", SETS)
def test_tiles_are_as_exact_as_they_say(name: str) -> None:
    x, y = SETS[name]
    distances = Distances(x, y)
    for dtype in (torch.float32, torch.float64):
        gap = (distances.tile(slice(None), slice(None), dtype).double() - squared(x, y)).abs()
        allowed = distances.relative_error(dtype) * (distances.xn[:, None] + distances.yn)
        assert bool((gap <= allowed).all())


def test_imprecise_products_are_not_trusted() -> None:
    x = normal(8, 4, 0).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Distances(x, x).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert Distances(x, x).dtype == torch.float32


@pytest.mark.parametrize("k", [0, 90])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="k: got"):
        nearest(normal(90, 2, 0), k=k)
    with pytest.raises(ValueError, match="k: got"):
        squared_radii(Sample(normal(90, 2, 0)), k)


def test_both_k_from_one_pass_are_those_of_each_alone() -> None:
    pair = Pair(Sample(SETS["normal"][0]), Sample(SETS["normal"][1]))
    direct = squared(pair.real.features, pair.fake.features)
    for k in (3, 5, 7):
        found, radii = manifold(pair, k), squared_radii(pair.real, k)
        assert torch.equal(found.density, (direct <= radii[:, None]).sum(dim=0).double() / k)
        assert torch.equal(found.coverage.bool(), (direct <= radii[:, None]).any(dim=1))
        assert torch.equal(found.recall.bool(), (direct <= squared_radii(pair.fake, k)).any(dim=1))


def test_kernel_sums_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = SETS["normal"]
    weights = torch.rand(3, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full, cross = cubic_kernel(x.double(), x.double()), cubic_kernel(x.double(), y.double())
    for step in (7, 64, 4096):
        monkeypatch.setattr("genkit_eval.metrics.kernels.STEP", step)
        assert torch.allclose(weighted_sum(cubic_kernel, x, weights, True), (weights @ full * weights).sum(1), rtol=1e-12)
        alone = float(weighted_sum(cubic_kernel, x, ones(x), False))
        assert alone == pytest.approx(float(full.sum() - full.trace()), rel=1e-12)
        assert torch.allclose(row_means(cubic_kernel, x, y), cross.mean(dim=1), rtol=1e-12)


@pytest.mark.parametrize("name", ["normal", "grid", "clustered"])
def test_authenticity_by_its_definition(name: str) -> None:
    train, fake = SETS[name]
    near = squared(fake, train).min(dim=1)
    own = squared(train, train).fill_diagonal_(torch.inf).min(dim=1).values
    found = authentic(train, fake)
    if name == "normal":  # elsewhere several training images are equally near, and any may be taken
        assert torch.equal(found, own[near.indices] < near.values)
    assert not found[near.values == 0].any()
    assert torch.equal(authentic(train, train[:5]), torch.zeros(5, dtype=torch.bool))
