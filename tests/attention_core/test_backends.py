"""Every backend against the definition, for every mask that it claims to know."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from genkit.attention import BACKENDS, AttentionBackend, BlockCausal, Causal, Mask, Sliding, attention, register_backend
from genkit.attention.backends import sdpa
from genkit.attention.backends.flex import Flex
from genkit.attention.base import ALL_KINDS
from genkit.attention.choice import reason
from tests.attention_core.cases import ATOL, Case, cases, deviation, fixed

KINDS = ("none", *sorted(ALL_KINDS))
HERE = [
    name
    for name, backend in BACKENDS.items()
    if backend.exact and not backend.optional and reason(name) is None and name != "flex"
]


def run(case: Case, backend: str | None = None) -> Tensor:
    return attention(case.q, case.k, case.v, mask=case.mask, scale=case.scale, backend=backend)


@pytest.fixture(autouse=True)
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention uncompiled, under another name: the same masks, without seconds of compilation for each shape."""
    monkeypatch.setitem(BACKENDS, "flex:plain", Flex(compiled=False))
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # else traced anew for each shape


def test_the_backends_of_torch_are_here() -> None:
    assert {"reference", "sdpa", "sdpa:flash", "sdpa:math"} <= set(HERE)
    assert {"flex", "xformers", "flash", "sage", "sdpa:efficient", "sdpa:cudnn"} <= set(BACKENDS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_calls(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, longest=10))
    wanted = case.expected()
    for name in (None, *HERE):
        found = run(case, name)
        assert found.dtype == case.q.dtype
        assert (found.double() - wanted).abs().max() < ATOL[case.q.dtype], name


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_random_calls_of_flex(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, longest=10))
    assert deviation(run(case, "flex:plain"), case) < ATOL[case.q.dtype]


class Forgetful(AttentionBackend):
    """Drops the mask, as the flex backend of diffusers drops is_causal."""

    name = "forgetful"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        return BACKENDS["reference"](q, k, v, None, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_mask_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "forgetful", Forgetful())
    case = fixed(kind)
    assert (deviation(run(case, "forgetful"), case) > 0.1) == (kind != "none")
    for name in (None, *HERE, "flex:plain"):
        assert deviation(run(case, name), case) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *HERE])
def test_gradients(kind: str, name: str | None) -> None:
    case = fixed(kind)

    def gradients(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
        out = attention(q, k, v, mask=case.mask, backend=backend)
        return list(torch.autograd.grad(out.square().sum(), (q, k, v)))

    for found, wanted in zip(gradients(name, torch.float32), gradients("reference", torch.float64), strict=True):
        assert (found - wanted).abs().max() < 1e-4


def test_long_blocks_are_one_call_each() -> None:
    sizes = (1, 4, 9, 16, 25, 36, 49)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in (139, 140, 140))
    mask = BlockCausal(sizes)
    assert sdpa.SDPA().block_by_block(q, mask) == (sdpa.BLOCK * len(sizes) <= 139)
    for block in (1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sdpa, "BLOCK", block)
            assert (attention(q, k, v, mask=mask) - attention(q, k, v, mask=mask, backend="reference")).abs().max() < 1e-5


@pytest.mark.slow
def test_compiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    case = fixed("tree", 37, 150)
    for mask in (case.mask, BlockCausal((5, 40, 90, 60))):
        one = Case(case.q, case.k, case.v, mask)
        assert deviation(run(one, "flex"), one) < 1e-5


def test_flex_on_a_cpu_has_no_gradients() -> None:
    case = fixed("causal")
    with pytest.raises(ValueError, match=r"'flex' cannot do this call: gradients.*Use auto, .*sdpa"):
        attention(case.q.requires_grad_(), case.k, case.v, backend="flex")


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 6), (2, 4, 5, 6)),
        ((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)),
        ((4, 5, 8), (4, 5, 8), (4, 5, 8)),
    ],
)
def test_shapes_that_do_not_fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit together: they must be"):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


def test_dtypes_that_do_not_fit() -> None:
    q, half = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="give all three in one dtype"):
        attention(q, q, half)
    with torch.autocast("cpu", torch.bfloat16):  # which casts them itself
        assert attention(q, q, half).dtype is torch.bfloat16


def test_masks_that_do_not_fit() -> None:
    from genkit.attention import Padding

    x = torch.zeros(2, 1, 5, 8)
    with pytest.raises(ValueError, match="mask is for 3 rows, but q has 2"):
        attention(x, x, x, mask=Padding((1, 2, 3)))
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=r"mask is torch\.float32.*bool"):
            attention(x, x, x, mask=torch.zeros(5, 5), backend=backend)


# The packages themselves compute on CUDA only. These stand-ins have their signatures, layouts and conventions.


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
) -> Tensor:
    assert dropout_p == 0
    mask: Mask | None = Causal() if causal else None
    if window_size != (-1, -1):
        assert window_size[1] == 0
        mask = Sliding(window_size[0] + 1)
    parts = (x.transpose(1, 2) for x in (q, k, v))
    return attention(*parts, mask=mask, scale=softmax_scale, backend="reference").transpose(1, 2)


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool = False, sm_scale: float | None = None
) -> Tensor:
    assert tensor_layout == "HND"
    return attention(q, k, v, mask=Causal() if is_causal else None, scale=sm_scale, backend="reference")


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if isinstance(attn_bias, Tensor):
        assert attn_bias.shape == scores.shape
        assert attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    elif attn_bias is not None:
        look = Causal().dense(q.shape[2], k.shape[2], "cpu")
        scores = scores if look is None else scores.masked_fill(~look, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, held in {
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "sageattention": {"sageattn": sageattn},
        "xformers.ops": {
            "memory_efficient_attention": memory_efficient_attention,
            "fmha": SimpleNamespace(attn_bias=SimpleNamespace(LowerTriangularFromBottomRightMask=object)),
        },
    }.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flash", "sage", "xformers"])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_random_calls_of_packages(name: str, kind: str, data: st.DataObject) -> None:
    case, backend = data.draw(cases(kind, longest=9, dtypes=(torch.float16,))), BACKENDS[name]
    mask = None if case.mask is None else case.mask.reduced(case.q.shape[2], case.k.shape[2])
    wanted = case.expected()
    if mask is not None and mask.kind not in backend.masks:
        return
    if name == "sage" and mask is not None and mask.kind == "causal" and case.q.shape[2] != case.k.shape[2]:
        return
    k, v = case.k, case.v
    if name == "xformers":  # without grouped queries
        k, v = (x.repeat_interleave(case.q.shape[1] // x.shape[1], 1) for x in (k, v))
    assert (backend(case.q, k, v, mask, case.scale).double() - wanted).abs().max() < ATOL[torch.float16]


def test_a_backend_of_ones_own() -> None:
    class Mine(AttentionBackend):
        name = "mine"
        dtypes = frozenset({torch.float64})

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
            return torch.full_like(q, 7)

    register_backend(Mine())
    try:
        x = torch.zeros(1, 1, 2, 4)
        assert (attention(x.double(), x.double(), x.double(), backend="mine") == 7).all()
        with pytest.raises(ValueError, match=r"'mine' cannot do this call: q is torch\.float32; it takes torch\.float64"):
            attention(x, x, x, backend="mine")
    finally:
        del BACKENDS["mine"]
    with pytest.raises(ValueError, match="name='auto'"):
        register_backend(type("Auto", (Mine,), {"name": "auto"})())
