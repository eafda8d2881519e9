"""Resize and 8-bit rules: the published tools' own pixels, PIL, and the definition of each rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from genkit_eval.extractors import resize
from genkit_eval.extractors.quantise import UINT8_RULES
from genkit_eval.extractors.resize import RULES, Preprocess
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "eval" / "extractors"
#: Levels. What torch computes in float32 in another order may differ in the last bit of 255.
TOLERANCE = {"clean": 1e-4, "torch-bilinear": 1e-4}
#: Every ninth pixel of what torch-fidelity, clean-fid, pytorch-fid, torchmetrics, EDM2, dgm-eval, cmmd-pytorch and
#: text2image-benchmark make of three synthetic images, under "<image> <rule> <size>".
EXPECTED = np.load(GOLDEN / "resize.npz")


def image(name: str) -> Tensor:
    if name == "noise_64":
        array = np.random.RandomState(1).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    else:
        array = np.array(Image.open(GOLDEN / f"{name}.png").convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None]


@pytest.mark.parametrize("case", EXPECTED.files)
def test_the_published_tools(case: str) -> None:
    name, rule, size = case.split()
    found = RULES[rule](image(name), int(size))
    assert found.dtype == torch.float32
    assert found.shape == (1, 3, int(size), int(size))
    off = np.abs(found[0].permute(1, 2, 0).numpy()[::9, ::9].astype(np.float64) - EXPECTED[case]).max()
    assert off <= TOLERANCE.get(rule, 0.0)


def large() -> Tensor:
    return torch.from_numpy(np.random.RandomState(5).randint(0, 256, (2, 3, 200, 131), dtype=np.uint8))


def test_tf1_is_its_definition_bit_for_bit() -> None:
    """Four neighbours of floor(i * n / size), in float32, one rounding for each operation; smaller and larger."""
    pixels = large()
    x = pixels[1].numpy().astype(np.float32)
    found = resize.tf1(pixels, 149)[1].numpy()

    def weights(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.arange(149, dtype=np.float32) * np.float32(n / 149)
        low = at.astype(np.int64)
        return low, np.minimum(low + 1, n - 1), at - low.astype(np.float32)

    (top, bottom, dy), (left, right, dx) = weights(200), weights(131)
    upper = x[:, top][:, :, left] + (x[:, top][:, :, right] - x[:, top][:, :, left]) * dx
    lower = x[:, bottom][:, :, left] + (x[:, bottom][:, :, right] - x[:, bottom][:, :, left]) * dx
    assert np.array_equal(found, upper + (lower - upper) * dy[:, None])


@pytest.mark.parametrize("size", [77, 299])
def test_clean_is_pil_on_float_channels(size: int) -> None:
    pixels = large()
    found = resize.clean(pixels, size)[0].numpy()
    for channel, values in zip(pixels[0].numpy(), found, strict=True):
        # The definition of clean-fid: no rounding to 8 bits in between.
        expected = np.asarray(Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(values - expected.clip(0, 255)).max() < 2e-4


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_every_rule_leaves_its_input_and_ignores_the_batch(rule: str) -> None:
    pixels = large()
    before = pixels.clone()
    both = RULES[rule](pixels, 64)
    assert pixels.equal(before)
    torch.testing.assert_close(RULES[rule](pixels[1:], 64), both[1:], rtol=0, atol=1e-4)
    if "pil" not in rule:
        torch.testing.assert_close(RULES[rule](pixels.float(), 64), both, rtol=0, atol=0)


def test_what_the_rules_refuse() -> None:
    assert RULES["none"](large()[:, :, :131], 131).dtype == torch.float32
    with pytest.raises(ValueError, match=r"resize='none': got images of 200x131; the network takes 64x64"):
        RULES["none"](large(), 64)
    with pytest.raises(ValueError, match=r"got torch.float32; the rule pil-bicubic takes uint8"):
        RULES["pil-bicubic"](large().float(), 64)


def test_preprocess_normalises_by_channel() -> None:
    prepare = Preprocess("tf1", 8, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    pixels = torch.full((1, 3, 4, 4), 61, dtype=torch.uint8)
    assert prepare(pixels)[0, :, 0, 0].tolist() == pytest.approx([60 / 4, 59 / 5, 58 / 6])
    assert Preprocess("none", None, (0, 0, 0), (1, 1, 1))(large()).shape == (2, 3, 200, 131)


PUBLISHED = {
    "guided-diffusion ((s+1)*127.5).clamp(0,255).to(uint8)": "adm-floor",
    "torchmetrics normalize=True (x*255).byte() on clamped": "adm-floor",
    "edm2 (s*127.5+128).clip(0,255).to(uint8)": "edm",
    "VAR x.mul(255).add(0.5).clamp(0,255) then uint8": "half-up",
    "torchvision save_image mul(255).add(0.5).clamp(0,255)": "half-up",
    "diffusers numpy_to_pil (x*255).round().astype(uint8)": "half-even",
}


@pytest.mark.parametrize("tool", list(PUBLISHED))
def test_uint8_rules(tool: str) -> None:
    """On values of [0, 1] that survive the way to [-1, 1] and back, four in five, so that no other rounding is in the way."""
    golden = np.load(GOLDEN / "quantise.npz")
    x = torch.from_numpy(golden["input01"])
    signed = 2 * x - 1
    exact = (signed + 1) / 2 == x
    assert float(exact.float().mean()) > 0.8
    expected = torch.from_numpy(golden[tool])[exact]
    agree = {name: bool(rule(signed)[exact].equal(expected)) for name, rule in UINT8_RULES.items()}
    assert agree[PUBLISHED[tool]]
    assert not agree["adm-floor" if PUBLISHED[tool] != "adm-floor" else "half-even"]


def test_uint8_rules_in_the_middle_and_beyond() -> None:
    x = torch.tensor([0.0, -3.0, 3.0, 127.2 / 127.5 - 1])  # 127.5 levels, far out on both sides, 127.2 levels
    found = {name: rule(x).tolist() for name, rule in UINT8_RULES.items()}
    assert found.pop("adm-floor") == [127, 0, 255, 127]
    assert all(values == [128, 0, 255, 127] for values in found.values())
    for rule in UINT8_RULES.values():
        with pytest.raises(ValueError, match="NaN"):
            rule(torch.tensor([float("nan")]))


def test_the_pipelines_rule_is_one_of_the_named() -> None:
    from genkit.pipelines.images import UINT8_RULE, to_uint8

    named = {rule.formula: rule for rule in UINT8_RULES.values()}
    x = torch.linspace(-1.1, 1.1, 5001)
    assert named[UINT8_RULE](x).equal(to_uint8(x))
