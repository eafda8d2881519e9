"""Backends and kernels beside float64: the measures, the bound of each, and that a bad one is found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.attention import BACKENDS, AttentionBackend, Unavailable, register_backend
from genkit.attention import deviation as dev
from genkit.attention import deviation_report as report
from genkit.attention.choice import reason
from genkit.attention.deviation_kernels import KERNELS

SHAPES = (dev.Shape(256, 72), dev.Shape(300, 64, gain=4.0, queries=64), dev.Shape(513, 64, queries=1))
#: Compiled anew for every shape, which takes minutes here; measured by the command.
SLOW = {"flex"}


def here() -> list[str]:
    return [name for name, backend in BACKENDS.items() if not backend.optional and reason(name) is None and name not in SLOW]


def test_measures() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 0.0])
    found = dev.deviation(a, b)
    assert found.largest == 4
    assert found.rms == pytest.approx(math.sqrt((9 + 1 + 1 + 16) / 4))
    assert found.bias == pytest.approx((-3 - 1 + 1 + 4) / 4)
    assert found.wasserstein == pytest.approx((1 + 0 + 0 + 0) / 4)  # sorted: 1 2 3 4 and 0 2 3 4


def test_shape_draws_the_same_again_and_scores_of_its_gain() -> None:
    shape = dev.Shape(200, 64, gain=4.0, queries=50)
    inputs = shape.draw((3, 4))
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {
        "q": (2, 2, 50, 64),
        "k": (2, 2, 200, 64),
        "v": (2, 2, 200, 64),
    }
    assert float((inputs["q"] @ inputs["k"].mT / 8).std()) == pytest.approx(4, rel=0.05)
    assert torch.equal(shape.draw((4,))["k"][0], inputs["k"][1])


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return dev.attention_deviation(here(), SHAPES)


def test_every_backend_keeps_its_bound(measured: list[dict[str, Any]]) -> None:
    lines = [line for line in measured if line["kind"] == "backend"]
    assert {line["name"] for line in lines} >= {"reference", "sdpa", "sdpa:math", "low_rank"}
    assert len({(line["name"], line["dtype"]) for line in lines}) >= 3 * 4
    assert not [line for line in lines if line["exceeds"]]


def test_plain_half_precision_is_outside_the_bound(measured: list[dict[str, Any]]) -> None:
    """What the bounds are for: every operation in bfloat16 or float16, its sums too, is more than they allow."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        lines = [x for x in measured if (x["name"], x["dtype"], x["gain"]) == ("naive", name, 4.0)]
        (line,) = lines
        found = dev.Deviation(line["largest"], line["rms"], line["bias"], line["wasserstein"])
        band = dev.Deviation(line["band_largest"], line["band_rms"], 0, 0)
        assert "exceeds" in str(dev.within(found, band, dev.bound_of("sdpa", dtype)))
        assert "exceeds" not in line, "no bound holds for a reference"


def test_references_are_what_they_say(measured: list[dict[str, Any]]) -> None:
    shape, dtype = SHAPES[0], torch.bfloat16
    inputs = shape.draw()
    exact = (inputs["q"] @ inputs["k"].mT / math.sqrt(72)).softmax(-1) @ inputs["v"]
    q, k, v = (x.bfloat16().double() for x in inputs.values())
    rounded = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    some = {x["name"]: x for x in measured if x["dtype"] == "bfloat16" and x["keys"] == 256}
    assert some["inputs rounded"]["rms"] == pytest.approx(float((rounded - exact).square().mean().sqrt()), rel=1e-6)
    assert some["output rounded"]["largest"] == pytest.approx(float((rounded.to(dtype).double() - rounded).abs().max()), rel=1e-6)
    assert some["reference"]["rms"] == pytest.approx(some["output rounded"]["rms"], rel=1e-6)
    assert some["sdpa"]["band_rms"] == pytest.approx(some["inputs rounded"]["rms"] + some["output rounded"]["rms"], rel=1e-6)


class Sloppy(AttentionBackend):
    """Accumulates in half precision, over tiles of 16 keys."""

    name = "sloppy"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
        out, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        for keys, values in zip(k.split(16, 2), v.split(16, 2), strict=True):
            weights = (q @ keys.mT / math.sqrt(q.shape[-1])).exp()
            out, total = out + weights @ values, total + weights.sum(-1, keepdim=True)
        return out / total


class Wrong(AttentionBackend):
    """Scores not divided by sqrt(D)."""

    name = "wrong"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize(
    ("backend", "dtypes"), [(Sloppy(), {"bfloat16", "float16"}), (Wrong(), {"float32", "bfloat16", "float16"})]
)
def test_bad_backend_is_found(backend: AttentionBackend, dtypes: set[str]) -> None:
    register_backend(backend)
    try:
        lines = dev.attention_deviation([backend.name], SHAPES[:2])
    finally:
        BACKENDS.pop(backend.name)
    assert {line["dtype"] for line in lines if line.get("exceeds")} >= dtypes


def test_acceptance_names_what_is_exceeded() -> None:
    band = dev.Deviation(1e-2, 1e-3, 0, 0)
    allowed = dev.Bound(2, 3)
    assert dev.within(dev.Deviation(3e-2, 2e-3, 0, 0), band, allowed) is None
    assert dev.within(dev.Deviation(3e-2, 2.1e-3, 0, 0), band, allowed) == "rms deviation 0.0021 exceeds 0.002 (2 x the band)"
    assert "largest deviation 0.031" in str(dev.within(dev.Deviation(3.1e-2, 2e-3, 0, 0), band, allowed))
    assert dev.within(dev.Deviation(3.1e-2, 2.1e-3, 0, 0), band, dev.Bound(2, 3, extra=1e-2)) is None
    assert "finite" in str(dev.within(dev.Deviation(math.nan, math.nan, 0, 0), band, allowed))


def test_bounds_are_found_by_family() -> None:
    assert dev.bound_of("sdpa:math", torch.bfloat16) is dev.BOUNDS["sdpa"][torch.bfloat16]
    assert dev.bound_of("mine", torch.float32) is dev.BOUNDS["other"][torch.float32]


def test_backend_asked_for_by_name_must_work() -> None:
    with pytest.raises(Unavailable, match="no-such"):
        dev.attention_deviation(["no-such"], SHAPES[2:], (torch.float32,))


def test_backend_asked_for_by_name_is_measured_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["sdpa:math"], "dtypes", frozenset({torch.bfloat16}))
    lines = dev.attention_deviation(["sdpa:math"], SHAPES[2:], (torch.float32, torch.bfloat16))
    assert {line["dtype"] for line in lines if line["kind"] == "backend"} == {"bfloat16"}


def test_command_names_a_backend_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dev.main(["--backends", "no-such", "--no-trajectories", "--quick"])
    assert caught.value.code == 2
    assert "backend 'no-such' is no attention backend" in capsys.readouterr().err


def test_every_kernel_keeps_its_bound() -> None:
    lines = dev.kernel_deviation()
    assert {line["name"] for line in lines} == set(KERNELS)
    assert not [line for line in lines if line["exceeds"]]
    by_name = {(line["name"], line["dtype"]): line for line in lines}
    assert 0 < by_name["modulate", "bfloat16"]["rms"] < 1e-2


@pytest.mark.parametrize("name", list(KERNELS))
def test_formulas_are_those_of_the_kernels(name: str) -> None:
    kernel = KERNELS[name]
    inputs = kernel.draw(torch.Generator().manual_seed(5))
    torch.testing.assert_close(kernel.run(**inputs), kernel.formula(**inputs), rtol=1e-7, atol=1e-7)


def test_command_writes_table_data_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(dev, "QUICK", SHAPES[2:])
    dev.main(["--quick", "--no-trajectories", "--backends", "sdpa", "reference", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| sdpa | bfloat16 |" in printed
    found = json.loads((tmp_path / "deviation.json").read_text())
    assert {line["name"] for line in found["attention"]} == {"inputs rounded", "output rounded", "naive", "sdpa", "reference"}
    assert (tmp_path / "deviation.png").read_bytes().startswith(b"\x89PNG")
    every = (tmp_path / "deviation.md").read_text()
    assert every.count("| 513 | 64 | 1 | 1 | float16 | sdpa |") == 1
    assert report.by_length(found["attention"], ["naive", "sdpa"])[2].startswith("| 513 | 64 | 1 | ")


def test_command_fails_when_a_bound_is_exceeded(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dev, "QUICK", SHAPES[:1])
    register_backend(Wrong())
    try:
        with pytest.raises(SystemExit, match=r"wrong, float32: rms deviation"):
            dev.main(["--quick", "--no-trajectories", "--backends", "wrong"])
    finally:
        BACKENDS.pop("wrong")
    assert "exceeded" in capsys.readouterr().out
