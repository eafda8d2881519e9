"""The U-Net: shapes, what each input does, and that rows of a batch do not touch each other."""

import math

import pytest
import torch
from torch import nn

from genkit.denoiser import EDMDenoiser
from genkit.models.unet import NoiseEmbedding, UNet, UNetConfig

TINY = {"image_size": 8, "num_classes": 3, "channels": (8, 16), "attention": (1,), "embedding": 16, "groups": 4}


def tiny(seed=0, **changes):
    """A network whose zero-initialised layers have been given weights."""
    torch.manual_seed(seed)
    net = UNet(UNetConfig(**{**TINY, **changes}))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.2)
    return net.eval().requires_grad_(False)


def inputs(batch=3, channels=3, size=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=g), torch.linspace(-1.5, 1, batch), torch.arange(batch) % 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 2, "attention": (0, 1)},
        {"patch": 1, "channels": (8, 8, 16), "attention": ()},
        {"patch": 4, "channels": [4]},
        {"image_channels": 1},
        {"image_size": 12, "channels": (8, 8)},
    ],
    ids=str,
)
def test_an_image_comes_out_as_it_went_in(changes):
    config = UNetConfig(**{**TINY, **changes})
    x, c_noise, label = inputs(channels=config.image_channels, size=config.image_size)
    out = tiny(**changes)(x, c_noise, label)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert out.std() > 0.01


def test_a_new_network_predicts_zero():
    """Its last layer starts at zero, so a new denoiser is c_skip x: the best guess without knowledge."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**TINY))
    x, c_noise, label = inputs()
    assert net(x, c_noise, label).abs().max() <= net.out.bias.abs().max()
    nn.init.zeros_(net.out.bias)
    denoised = EDMDenoiser(net, 0.5)(x, torch.tensor([0.5, 1.0, 2.0]), label)
    torch.testing.assert_close(denoised, x * torch.tensor([0.5, 0.2, 0.25 / 4.25])[:, None, None, None])


def test_every_row_stands_alone():
    net, (x, c_noise, label) = tiny(), inputs()
    whole = net(x, c_noise, label)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(x[order], c_noise[order], label[order]), whole[order], rtol=0, atol=1e-5)
    alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_noise_and_label_belong_to_their_row():
    """Changing one row's condition changes that row alone, and does change it."""
    net, (x, c_noise, label) = tiny(), inputs()
    whole = net(x, c_noise, label)
    for changed in (net(x, c_noise + torch.tensor([0, 0.3, 0]), label), net(x, c_noise, torch.tensor([0, 2, 2]))):
        difference = (changed - whole).abs().amax((1, 2, 3))
        assert difference[1] > 1e-3
        assert difference[[0, 2]].max() < 1e-5


def test_every_label_counts_and_the_last_is_the_dropped_one():
    net, (x, c_noise, _) = tiny(), inputs(1)
    assert net.label.num_embeddings == 4
    outs = [net(x, c_noise, torch.tensor([c])) for c in range(4)]
    assert all((outs[i] - outs[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    with pytest.raises(IndexError):
        net(x, c_noise, torch.tensor([4]))


def test_noise_features_tell_near_levels_apart():
    embedding = NoiseEmbedding(16)
    levels = torch.tensor([0.002, 0.0021, 0.5, 0.52, 79.0, 80.0]).log() / 4
    features = embedding(levels)
    assert torch.cdist(features, features).add(torch.eye(6)).min() > 1e-2
    assert not [name for name, _ in embedding.named_parameters() if "frequencies" in name]
    assert "frequencies" not in embedding.state_dict()
    assert embedding.frequencies[0].item() == pytest.approx(0.5)
    assert embedding.frequencies[-1].item() == pytest.approx(64.0, rel=1e-5)
    assert math.isclose(float(embedding.frequencies[1] / embedding.frequencies[0]), 128 ** (1 / 31), rel_tol=1e-5)


def test_gradients_reach_every_weight():
    net = tiny().requires_grad_(True)
    x, c_noise, label = inputs(4)
    label = torch.tensor([0, 1, 2, 3])
    net(x[[0, 1, 2, 0]], c_noise[[0, 1, 2, 0]], label).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, r"image_size=10 must be divisible by patch \* 2\*\*\(levels - 1\) = 4"),
        ({"image_size": 2}, "image_size=2 must be divisible"),
        ({"channels": (8, 16, 16, 16)}, "image_size=8 must be divisible .* = 16"),
        ({"channels": (8, 10)}, r"channels=\(8, 10\) must all be divisible by groups=4"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**TINY, **changes})


def test_lists_become_tuples():
    assert UNetConfig(**{**TINY, "channels": [8, 16], "attention": [1]}) == UNetConfig(**TINY)
    assert hash(UNetConfig(**{**TINY, "channels": [8, 16], "attention": [1]}))
