"""The choice of attention in networks of diffusers: what diffusers' own does not do, and that ours does it and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from genkit.attention import BACKENDS, Unavailable, register_backend, use_attention
from genkit.attention.backends import flex
from genkit.attention.backends.reference import Reference
from genkit.attention.base import REASONS
from genkit.pipelines import DiffusersPipeline
from genkit.pipelines.attach import attach
from genkit.pipelines.attach.attend import attend
from genkit.pipelines.attention_diffusers import _member, set_attention, switched
from tests.attach.tiny import CASES, distance, lively, randn, seeded, unet

FAMILIES = [
    "sd",
    "sdxl",
    "sd3",
    "pixart",
    "sana",
    "dit",
    "sd control",
    "flux",
    "qwen",
    "wan 2.2",
    "hunyuan",
    "lumina 2",
    "z-image",
]
OLD, NEW, OTHER = ["dit", "sd"], ["flux", "qwen"], ["sd3"]


class Counted(Reference):
    """The reference, and how often it was called."""

    name = "counted"
    calls = 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return super().__call__(*args)


@pytest.fixture
def counted() -> Iterator[Counted]:
    backend = Counted()
    register_backend(backend)
    yield backend
    del BACKENDS["counted"]
    REASONS.pop("counted", None)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' dispatcher, whose state for the whole process is put back afterwards."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    return _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    yield
    for case in CASES.values():
        if case.make in LOADED:
            set_attention(case.pipe, None)
    LOADED.clear()


LOADED: set[Any] = set()


def case_of(name: str) -> Any:
    LOADED.add(CASES[name].make)
    return CASES[name]


def network(name: str) -> Any:
    pipe = CASES[name].pipe
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def layers(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if hasattr(m, "set_processor")]


# ---- diffusers' own faults ----


@pytest.mark.parametrize("name", OLD)
def test_diffusers_own_choice_does_nothing_in_older_networks(name: str, counted: Counted, registry: Any) -> None:
    case, net, asked = case_of(name), network(name), []
    plain = case(3.0, num_inference_steps=2)
    own = registry._backends[AttentionBackendName._NATIVE_MATH]
    registry._backends[AttentionBackendName._NATIVE_MATH] = lambda **options: asked.append(1) or own(**options)
    try:
        net.set_attention_backend("_native_math")
        assert torch.equal(case(3.0, num_inference_steps=2), plain)
    finally:
        registry._backends[AttentionBackendName._NATIVE_MATH] = own
        net.reset_attention_backend()
    assert asked == []  # it says nothing, and is never asked
    set_attention(case.pipe, "counted")
    assert distance(case(3.0, num_inference_steps=2), plain) < 1e-5
    assert counted.calls == 2 * len(layers(net))


def test_diffusers_own_choice_is_one_of_the_process(counted: Counted, registry: Any) -> None:
    case, before = case_of("flux"), registry.get_active_backend()[0]
    network("flux").set_attention_backend("_native_math")
    network("flux").reset_attention_backend()
    assert registry.get_active_backend()[0] is AttentionBackendName._NATIVE_MATH  # for every other network, from now on
    registry.set_active_backend(before)
    set_attention(case.pipe, "counted")
    assert registry.get_active_backend()[0] is before
    qwen = CASES["qwen"](2.0)
    assert counted.calls == 0
    case(3.0)
    assert counted.calls == 4 * 2 * len(layers(network("flux")))  # steps, branches
    set_attention(case.pipe, None)
    counted.calls = 0
    case(3.0)
    assert counted.calls == 0
    assert torch.equal(CASES["qwen"](2.0), qwen)


def test_diffusers_flex_forgets_causality_and_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(1, 8, 2, 16, seed=i) for i in range(3))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    full, causal = (scaled_dot_product_attention(*heads, is_causal=flag).transpose(1, 2) for flag in (False, True))
    compiled, plain = [], attention_dispatch.flex_attention.flex_attention

    def made(call: Any, *args: Any, **options: Any) -> Any:
        compiled.append(call)
        return call

    monkeypatch.setattr(torch, "compile", made)
    flex._compiled.cache_clear()
    try:
        theirs = dispatch_attention_fn(q, k, v, is_causal=True, backend=AttentionBackendName.FLEX)
        assert (distance(theirs, full) < 1e-6, distance(theirs, causal) < 0.1) == (True, False)
        assert plain not in compiled  # torch itself compiles something around it, which computes all scores
        ours = dispatch_attention_fn(q, k, v, is_causal=True, backend=_member("flex"))
        assert distance(ours, causal) < 1e-6
        assert plain in compiled
    finally:
        flex._compiled.cache_clear()


# ---- ours ----


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_reached_and_put_back(name: str, counted: Counted) -> None:
    case, net = case_of(name), network(name)
    processors = [layer.processor for layer in layers(net)]
    states = [(layer, dict(layer.__dict__), dict(getattr(layer.processor, "__dict__", {}))) for layer in layers(net)]
    plain = case(3.0, num_inference_steps=2)
    reached = set_attention(case.pipe)
    assert torch.equal(case(3.0, num_inference_steps=2), plain)  # torch's own is the automatic choice
    set_attention(case.pipe, "counted")
    assert distance(case(3.0, num_inference_steps=2), plain) < 1e-5
    assert counted.calls > 0 or name == "sana"  # whose cross-attention has a mask that is added
    assert reached.total > 0
    assert not reached.skipped
    set_attention(case.pipe, None)
    assert [layer.processor for layer in layers(net)] == processors
    for layer, own, processor in states:
        assert layer.__dict__.keys() == own.keys()
        assert dict(getattr(layer.processor, "__dict__", {})) == processor


@pytest.mark.parametrize(("name", "way"), [("dit", "processor"), ("flux", "dispatcher"), ("sd3", "redirected")])
def test_the_way_it_is_reached(name: str, way: str) -> None:
    reached = set_attention(case_of(name).pipe)
    assert getattr(reached, way) == reached.total == len(layers(network(name)))


@pytest.mark.parametrize("name", ["dit", "flux", "sd3"])
def test_the_context_comes_before_the_network(name: str, counted: Counted) -> None:
    case = case_of(name)
    set_attention(case.pipe, "sdpa")
    case(3.0, num_inference_steps=1)
    assert counted.calls == 0
    with use_attention("counted"):
        case(3.0, num_inference_steps=1)
    assert counted.calls > 0
    counted.calls = 0
    case(3.0, num_inference_steps=1)
    assert counted.calls == 0


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
@pytest.mark.parametrize("guidance", ["PAG(3.0)", "SEG(3.0)", "SLG(2.0)"])
def test_weakened_layers(name: str, guidance: str, counted: Counted) -> None:
    """They are weakened as before, and their attention is still the chosen one."""
    case = case_of(name)

    def run() -> Tensor:
        with attach(case.pipe, guidance):
            return case(3.0, num_inference_steps=2)

    plain = run()
    set_attention(case.pipe, "counted")
    assert distance(run(), plain) < 1e-5
    assert counted.calls > 0


def test_processors_with_weights_and_those_of_others_stay() -> None:
    class Own(AttnProcessor2_0):
        pass

    net = seeded(lively, unet()).eval()
    first, second, *rest = layers(net)
    adapter, own = IPAdapterAttnProcessor2_0(second.to_q.in_features, 12), Own()
    first.set_processor(own)
    second.set_processor(adapter)
    with pytest.warns(UserWarning, match=r"stays.*1 x Own, 1 x IPAdapterAttnProcessor2_0"):
        reached = set_attention(net, "reference")
    assert reached.processor == len(rest)
    assert (first.processor, second.processor) == (own, adapter)
    set_attention(net, None)
    assert (first.processor, second.processor) == (own, adapter)
    for layer in layers(net):
        layer.set_processor(Own())
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*can be switched.*Own"):
        set_attention(net)


def test_what_is_put_there_afterwards_stays() -> None:
    net = unet()
    set_attention(net, "reference")
    later = AttnProcessor()
    layers(net)[0].set_processor(later)
    set_attention(net, None)
    assert layers(net)[0].processor is later
    assert {type(layer.processor) for layer in layers(net)[1:]} == {AttnProcessor2_0}
    flux = seeded(CASES["flux"].make).transformer
    layers(flux)[0].processor._attention_backend = AttentionBackendName._NATIVE_MATH
    set_attention(flux, "reference")
    set_attention(flux, "sdpa")
    set_attention(flux, None)
    assert layers(flux)[0].processor._attention_backend is AttentionBackendName._NATIVE_MATH
    assert "_attention_backend" not in layers(flux)[1].processor.__dict__


def test_one_processor_for_all_layers(counted: Counted) -> None:
    flux = seeded(CASES["flux"].make).transformer
    shared = layers(flux)[0].processor
    for layer in layers(flux):
        layer.processor = shared
    set_attention(flux, "counted")
    set_attention(flux, None)
    assert shared.__dict__ == {}


@pytest.mark.parametrize("name", ["dit", "flux", "sd3"])
def test_a_copy_keeps_the_choice_as_its_own(name: str, counted: Counted) -> None:
    net = network(name)
    set_attention(net, "counted")
    twin = copy.deepcopy(net)
    set_attention(net, None)
    assert {layer.attention_backend for layer in layers(twin)} == {"counted"}
    set_attention(twin, None)
    assert [type(layer.processor) for layer in layers(twin)] == [type(layer.processor) for layer in layers(net)]


def test_for_a_while() -> None:
    net = network("dit")
    with switched(net, "reference"):
        with switched(net, "sdpa"), switched(net, None):
            assert {layer.attention_backend for layer in layers(net)} == {"sdpa"}
        assert {layer.attention_backend for layer in layers(net)} == {"reference"}
    assert not any(hasattr(layer, "attention_backend") for layer in layers(net))


def test_recorded_in_a_run(counted: Counted) -> None:
    pipe = DiffusersPipeline(CASES["dit"].pipe)
    options = {"class_labels": [1], "num_inference_steps": 2, "guidance": 3.0, "output_type": "latent"}
    plain = pipe(**options)
    assert plain.attention == {}
    got = pipe(**options, attention="counted")
    assert (got.attention["backend"], counted.calls) == ("counted", 2 * len(layers(pipe.network)))
    assert distance(got.images, plain.images) < 1e-5
    assert not any(hasattr(layer, "attention_backend") for layer in layers(pipe.network))
    with pytest.raises(Unavailable, match="nothing"):
        pipe(**options, attention="nothing")


def test_messages() -> None:
    with pytest.raises(Unavailable, match="'nothing' is no attention backend"):
        set_attention(CASES["dit"].pipe, "nothing")
    with pytest.raises(ValueError, match="no network"):
        set_attention(3)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_it_can_be_traced_in_one_piece(name: str) -> None:
    net = copy.deepcopy(network(name))
    inputs: dict[str, Any] = {
        "hidden_states": randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    if name == "flux":
        inputs = {"hidden_states": randn(1, 4, 16), "timestep": torch.tensor([0.5]), "encoder_hidden_states": randn(1, 5, 12)}
        inputs |= {"pooled_projections": randn(1, 10), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
    set_attention(net, "reference")
    with torch.no_grad():
        plain = net(**inputs, return_dict=False)[0]
        traced = torch.compile(net, backend="eager", fullgraph=True)
        assert distance(traced(**inputs, return_dict=False)[0], plain) < 1e-6


# ---- the call itself ----

q, k, v = randn(2, 4, 6, 8), randn(2, 4, 6, 8, seed=1), randn(2, 4, 6, 8, seed=2)
longer, values = randn(2, 4, 9, 8, seed=1), randn(2, 4, 9, 8, seed=2)
CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": ((q, k, v), {}),
    "causal": ((q, k, v), {"is_causal": True}),
    "causal over more keys": ((q, longer, values), {"is_causal": True}),
    "bool": ((q, longer, values), {"attn_mask": randn(6, 9) > -1}),
    "bool of the keys": ((q, longer, values), {"attn_mask": randn(2, 1, 1, 9) > -1}),
    "added": ((q, longer, values), {"attn_mask": randn(2, 4, 6, 9)}),
    "scale": ((q, k, v), {"scale": 0.3}),
    "groups": ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
    "three axes": ((q[0], k[0], v[0]), {}),
    "one batch for all": ((q, k[:1], v[:1]), {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_the_call_means_what_torch_means(call: str, backend: str) -> None:
    args, options = CALLS[call]
    assert distance(attend(*args, **options, default=backend), scaled_dot_product_attention(*args, **options)) < 1e-6


def test_a_mask_beside_is_causal_means_what_it_means_to_torch() -> None:
    x = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True], [False, True, True], [True, False, False]])
    assert torch.equal(attend(x, x, x, mask, is_causal=True), scaled_dot_product_attention(x, x, x, mask, is_causal=True))
