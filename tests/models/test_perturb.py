"""Weakened networks: each operation against its closed form, and nothing but the chosen layers, rows and thread touched."""

import copy
import math
import threading

import pytest
import torch
from torch import nn

from genkit.denoiser import EDMDenoiser
from genkit.guidance.base import Perturbation
from genkit.models import perturb
from genkit.models.perturb import attention, blur_queries
from genkit.models.unet import ResBlock, SelfAttention, UNet, UNetConfig
from tests.models.test_unet import TINY, inputs, tiny
from tests.toys import golden

DEEP = {"channels": (8, 16), "attention": (0, 1), "blocks": 2}
KINDS = [Perturbation("identity"), Perturbation("blur"), Perturbation("blur", sigma=1.0), Perturbation("skip")]


def tokens(height=5, width=4, heads=2, dim=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, height * width, dim, generator=g, dtype=torch.float64)


# ---- the operations ----


@pytest.mark.parametrize(
    ("key", "sigma"), [("sigma0.5", 0.5), ("sigma1", 1.0), ("sigma3", 3.0), ("sigma100", 100.0), ("sigma_inf", math.inf)]
)
def test_blur_is_that_of_the_official_code(key, sigma):
    arrays, _ = golden("guidance/seg_blur")
    image = torch.from_numpy(arrays["query"])
    query = image.reshape(2, 2, 3, 64).mT  # two heads of width 3
    blurred = blur_queries(query, 8, 8, sigma).mT.reshape(image.shape)
    torch.testing.assert_close(blurred, torch.from_numpy(arrays[key]), rtol=2e-6, atol=2e-6)


def reflect(i, n):
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 6), (2, 3), (7, 1), (1, 1)])
@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 7.5, 1e300])
def test_blur_is_the_sum_written_out(height, width, sigma):
    query = tokens(height, width)

    def taps(n):
        half = n // 2 if 6 * sigma >= n else math.ceil(6 * sigma) // 2
        weights = {k: math.exp(-((k / sigma) ** 2) / 2) for k in range(-half, half + 1)}
        return {k: w / sum(weights.values()) for k, w in weights.items()}

    expected = torch.zeros_like(query)
    for y in range(height):
        for x in range(width):
            for i, a in taps(height).items():
                for j, b in taps(width).items():
                    source = reflect(y + i, height) * width + reflect(x + j, width)
                    expected[:, :, y * width + x] += a * b * query[:, :, source]
    torch.testing.assert_close(blur_queries(query, height, width, sigma), expected)


def test_infinite_sigma_is_the_mean_and_a_finite_one_is_not():
    """diffusers 0.42.1 has it the other way round."""
    query = tokens()
    mean = query.mean(2, keepdim=True)
    torch.testing.assert_close(blur_queries(query, 5, 4, math.inf), mean.expand_as(query))
    for sigma in (0.7, 5.0, 1e6):
        assert (blur_queries(query, 5, 4, sigma) - mean).abs().max() > 0.05


def test_blur_leaves_a_constant_alone_and_stays_in_its_dtype():
    flat = torch.full((1, 1, 20, 2), 3.0, dtype=torch.float16)
    out = blur_queries(flat, 4, 5, 2.0)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, flat, rtol=0, atol=1e-2)


def test_blur_of_what_it_cannot_blur():
    with pytest.raises(ValueError, match="query has 20 tokens, which is not height=4 x width=4"):
        blur_queries(tokens(), 4, 4)
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"sigma=.* must be above 0"):
            blur_queries(tokens(), 5, 4, sigma)


def test_attention_by_its_formula():
    q, k, v = tokens(seed=1), tokens(seed=2), tokens(seed=3)

    def plain(q):
        return ((q @ k.mT) / math.sqrt(3)).softmax(-1) @ v

    torch.testing.assert_close(attention(q, k, v, 5, 4), plain(q))
    assert attention(q, k, v, 5, 4, Perturbation("identity")) is v
    mean = plain(q.mean(2, keepdim=True).expand_as(q))
    torch.testing.assert_close(attention(q, k, v, 5, 4, Perturbation("blur")), mean)
    torch.testing.assert_close(attention(q, k, v, 5, 4, Perturbation("blur", sigma=0.5)), plain(blur_queries(q, 5, 4, 0.5)))


# ---- layers of the U-Net ----


def layer(net, name):
    return net.get_submodule(name)


def output_of(net, name, perturbation):
    """What goes into a layer and what comes out of it, in a weakened pass."""
    seen = []
    handle = layer(net, name).register_forward_hook(lambda module, args, out: seen.append((args, out)))
    with net.perturbed(perturbation):
        net(*inputs())
    handle.remove()
    return seen[0]


def projected(module, x, values):
    """The residual connection around the attention: x + W_out y."""
    return x + nn.functional.conv2d(values, module.out.weight, module.out.bias)


def split(module, x):
    q, k, v = nn.functional.conv2d(module.norm(x), module.qkv.weight, module.qkv.bias).chunk(3, dim=1)
    return q, k, v


def test_identity_attention_gives_its_values():
    net = tiny(**DEEP)
    (x,), out = output_of(net, "down.3.1", Perturbation("identity", ("down.3.1",)))
    module = layer(net, "down.3.1")
    torch.testing.assert_close(out, projected(module, x, split(module, x)[2]))


def test_infinite_blur_attends_alike_everywhere():
    net = tiny(**DEEP)
    (x,), out = output_of(net, "up.1.1", Perturbation("blur", ("up.1.1",)))
    module = layer(net, "up.1.1")
    q, k, v = split(module, x)
    weight = (torch.einsum("bc,bcyx->byx", q.mean((2, 3)), k) / math.sqrt(16)).flatten(1).softmax(-1)
    mean = torch.einsum("bt,bct->bc", weight, v.flatten(2))[:, :, None, None].expand_as(x)
    torch.testing.assert_close(out, projected(module, x, mean), rtol=1e-4, atol=1e-5)


def test_a_skipped_block_passes_its_input_on():
    net = tiny(**DEEP)
    for name in ("middle", "down.0.0", "down.4.1"):  # the last is an attention
        args, out = output_of(net, name, Perturbation("skip", (name,)))
        assert torch.equal(out, args[0]), name
    args, out = output_of(net, "up.0.0", Perturbation("skip", ("up.0.0",)))  # 32 channels in, 16 out
    assert torch.equal(out, nn.functional.conv2d(args[0], layer(net, "up.0.0").skip.weight, layer(net, "up.0.0").skip.bias))


@pytest.mark.parametrize(
    ("kind", "wanted", "names"),
    [
        ("identity", (), ["down.4.1", "up.0.1"]),
        ("blur", ("mid",), ["down.4.1", "up.0.1"]),
        ("identity", ("down",), ["down.0.1", "down.1.1", "down.3.1", "down.4.1"]),
        ("identity", ("down.1", "up.0"), ["down.1.1", "up.0.1"]),
        ("skip", (), ["middle"]),
        ("skip", ("down.1",), ["down.1.0", "down.1.1"]),
        ("skip", ("middle", "mid", "up.4.0"), ["up.4.0", "middle"]),
    ],
)
def test_names_stand_for_layers(kind, wanted, names):
    net = tiny(**DEEP)
    with net.perturbed(Perturbation(kind, wanted)):
        weak = [name for name, module in net.named_modules() if perturb.active(module)]
    assert weak == names
    assert not any(perturb.active(module) for module in net.modules())


def test_an_unknown_layer_is_answered_with_the_known_ones():
    net = tiny()
    with pytest.raises(ValueError, match=r"'mid_block', which this network does not have; it has down.2.1, up.0.1, mid.down.2.1"):
        net.perturbed(Perturbation("identity", ("down", "mid_block")))
    with pytest.raises(ValueError, match=r"'middle', which .* has down.2.1"):  # it is a block without attention
        net.perturbed(Perturbation("blur", ("middle",)))
    with pytest.raises(ValueError, match=r"'down.2.1.qkv'"):
        net.perturbed(Perturbation("skip", ("down.2.1.qkv",)))
    with pytest.raises(ValueError, match=r"'mid', which this network does not have; it has none"):
        tiny(attention=()).perturbed(Perturbation("identity"))
    with pytest.raises(ValueError, match="Conv2d cannot be weakened"):
        EDMDenoiser(nn.Conv2d(3, 3, 1)).perturbed(Perturbation("identity"))


# ---- nothing else changes ----


@pytest.mark.parametrize("perturbation", KINDS, ids=str)
def test_outside_the_context_nothing_is_changed(perturbation):
    net = tiny()
    before, weights = net(*inputs()), copy.deepcopy(net.state_dict())
    with net.perturbed(perturbation):
        inside = net(*inputs())
    assert (inside - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="stop"), net.perturbed(perturbation):
        raise RuntimeError("stop")
    assert torch.equal(net(*inputs()), before)
    assert net.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


def test_a_network_beside_it_is_not_weakened():
    net, other = tiny(), tiny(1)
    before = other(*inputs())
    with net.perturbed(Perturbation("skip", ("down", "mid", "up"))):
        assert torch.equal(other(*inputs()), before)


def test_nested_contexts_add_up_and_end_one_by_one():
    net = tiny(**DEEP)
    both = [Perturbation("identity", ("down",)), Perturbation("skip", ("middle",))]
    with net.perturbed(both[0]):
        first = net(*inputs())
        with net.perturbed(both[1]):
            assert perturb.active(layer(net, "down.0.1")) == both[0]
            assert perturb.active(layer(net, "middle")) == both[1]
            with net.perturbed(Perturbation("blur", ("down.0",))):  # the innermost counts
                assert perturb.active(layer(net, "down.0.1")).kind == "blur"
            assert (net(*inputs()) - first).abs().max() > 1e-3
        assert torch.equal(net(*inputs()), first)


def test_another_thread_sees_the_whole_network():
    net, outs = tiny(), {}
    before = net(*inputs())
    thread = threading.Thread(target=lambda: outs.update(other=net(*inputs())))
    with net.perturbed(Perturbation("skip")):
        thread.start()
        thread.join()
        outs["here"] = net(*inputs())
    assert torch.equal(outs["other"], before)
    assert not torch.equal(outs["here"], before)


def test_weakened_rows_stand_alone_and_carry_gradients():
    net, (x, c_noise, label) = tiny(), inputs()
    for perturbation in KINDS:
        with net.perturbed(perturbation):
            whole = net(x, c_noise, label)
            alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1]) for i in range(3)])
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(leaf, c_noise, label).square().sum(), leaf)
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_the_state_dict_has_the_names_it_had():
    keys = UNet(UNetConfig(**TINY)).state_dict().keys()
    kinds = {"norm", "conv1", "conv2", "modulation", "skip", "qkv", "out", "linear", "label", "mix", "stem", "out_norm"}
    assert {key.split(".")[-2] for key in keys} == kinds
    assert {type(m) for m in tiny().modules()} >= {ResBlock, SelfAttention}


# ---- embeddings in place of labels ----


def test_a_label_and_its_embedding_are_one_condition():
    net, (x, c_noise, label) = tiny(), inputs()
    denoiser = EDMDenoiser(net)
    for model in (net, denoiser):
        embedded = model.embed(label)
        assert embedded.shape == (3, 16)
        assert torch.equal(embedded[1], net.label.weight[label[1]])
        assert torch.equal(model.embed(embedded), embedded)
        assert model.num_classes == 3
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.equal(net(x, c_noise, embedded), net(x, c_noise, label))
    assert torch.equal(denoiser(x, sigma, embedded.double()), denoiser(x, sigma, label))
    assert not torch.equal(denoiser(x, sigma, embedded + 0.1), denoiser(x, sigma, label))


def test_a_network_without_embeddings_keeps_its_condition():
    denoiser = EDMDenoiser(nn.Conv2d(3, 3, 1))
    condition = {"label": torch.tensor([1])}
    assert denoiser.embed(condition) is condition
    assert denoiser.num_classes is None
