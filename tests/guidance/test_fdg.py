"""FDG: its pyramid, its bands and its scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.guidance import CFG, Guidance, NoGuidance, Scheduled
from genkit.guidance.fdg import FDG, blur, collapse, pyramid
from tests.toys import Run, reference, step_info


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COND, UNCOND = randn(3, 4, 6, 5, seed=1), randn(3, 4, 6, 5, seed=2)


def once(guidance: Guidance, cond: Tensor = COND, uncond: Tensor = UNCOND, **step: Any) -> Tensor:
    return guidance.combine(step_info(cond, **step), {"cond": cond, "uncond": uncond}, None)[0].denoised


SIZES = [(16, 16), (104, 152), (7, 13), (1, 1), (1, 9), (2, 3), (31, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_a_pyramid_gives_its_image_back(size: tuple[int, int], levels: int) -> None:
    image = randn(2, 3, *size)
    torch.testing.assert_close(collapse(pyramid(image, levels)), image)


def test_a_pyramid_separates_frequencies() -> None:
    smooth = torch.linspace(0, 1, 64, dtype=torch.float64).cos().expand(1, 1, 64, 64)
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).double()[None, None]
    for image, band in ((smooth, 1), (checks, 0)):
        sizes = [float(b.square().mean().sqrt()) for b in pyramid(image, 2)]
        assert sizes[1 - band] < 0.02 * sizes[band]
    for n in (1, 2, 3, 8):
        torch.testing.assert_close(blur(n).sum(1), torch.ones(n, dtype=torch.float64))


def test_equal_scales_are_cfg() -> None:
    for shape in ((3, 4, 6, 5), (2, 3, 2, 9, 5)):
        cond, uncond = randn(*shape, seed=5), randn(*shape, seed=6)
        torch.testing.assert_close(once(FDG((4.0, 4.0, 4.0)), cond, uncond), uncond + 4 * (cond - uncond))
    torch.testing.assert_close(Run(FDG((3.0,))).out, reference(CFG(3.0)).out)


@pytest.mark.parametrize("scales", [(10.0, 5.0), (0.5, 3.0, -4.0), (1.0, 2.0)])
def test_an_override_multiplies_all_bands_by_one_factor(scales: tuple[float, ...]) -> None:
    made = FDG(scales)
    assert made.scale in scales
    farthest = made.scale - 1
    assert abs(farthest) == max(abs(w - 1) for w in scales)
    for w in (-1.0, 0.5, 3.0, 20.0):
        same = FDG(tuple(1 + (v - 1) * (w - 1) / farthest for v in scales))
        torch.testing.assert_close(once(made, weight=w), once(same))
    assert [len(made.plan(step_info(COND, weight=w), None)) for w in (1.0, 1.5)] == [1, 2]
    assert torch.equal(Run(Scheduled(FDG((1.0, 1.0)), "linear")).out, reference(NoGuidance()).out)


def test_bands_open_and_close_on_their_own() -> None:
    made = FDG((6.0, 3.0), start=(0.5, 0), stop=(1, 0.8))
    open_bands = [[bool(g) for g in made.gains(step_info(COND, i, 10))] for i in range(10)]
    assert open_bands == [[i >= 5, i < 8] for i in range(10)]
    for i, alike in ((2, (1.0, 3.0)), (6, (6.0, 3.0)), (9, (6.0, 1.0))):
        torch.testing.assert_close(once(made, index=i, total=10), once(FDG(alike)))
    late = FDG((6.0, 3.0), start=0.5)
    assert [len(late.plan(step_info(COND, i, 4), None)) for i in range(4)] == [1, 1, 2, 2]


def test_fdg_is_differentiable_after_inference() -> None:
    cond = randn(1, 2, 11, 6).requires_grad_()
    with torch.inference_mode():
        once(FDG((3.0, 2.0)), cond.detach(), 0 * cond.detach())
    once(FDG((3.0, 2.0)), cond, torch.zeros(1, 2, 11, 6, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(cond.grad).all()  # type: ignore[arg-type]


def test_fdg_needs_images() -> None:
    with pytest.raises(ValueError, match=r"FDG: x of shape \(2, 5, 3\) has no height and width"):
        once(FDG(), randn(2, 5, 3), randn(2, 5, 3, seed=1))


def test_lists_are_tuples() -> None:
    assert FDG([10, 5], [0.5, 1], stop=[1, 1]) == FDG((10.0, 5.0), (0.5, 1.0), 0, (1.0, 1.0))  # type: ignore[arg-type]
    assert {FDG([10, 5])} == {FDG()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FDG(5.0), r"FDG: scales=5\.0 must be a list of numbers, one for each band"),
        (lambda: FDG(()), r"FDG: scales=\(\) must be a list"),
        (lambda: FDG("ab"), r"FDG: scales='ab' must be a list"),
        (lambda: FDG((3.0, float("nan"))), r"FDG: scales=\(3\.0, nan\) must hold finite numbers"),
        (lambda: FDG((3.0, 2.0), (1.0,)), r"FDG: parallel=\(1\.0,\) must be one number, or 2, one for each of scales"),
        (lambda: FDG((3.0, 2.0), start=2), r"FDG: start=2 must hold numbers from 0 to 1"),
    ],
)
def test_bad_argument_names_itself_and_what_works(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
