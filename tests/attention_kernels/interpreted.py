"""The Triton programs, alone and in networks, against the plain forms: run in Triton's interpreter by test_interpreter.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch

from genkit.attention.kernels import gated_modulate, guidance_update, launch, modulate, qk_norm_rope, sample_logits
from genkit.denoiser import Guided
from genkit.guidance.apg import APG
from genkit.guidance.base import StepInfo
from genkit.models.flowar import FlowAR, FlowARConfig
from genkit.models.llama import rope_table
from genkit.models.llamagen import LlamaGen, LlamaGenConfig
from genkit.models.var import VAR, VARConfig
from genkit.noise import VE
from genkit.samplers.autoregressive.filters import Filters, Race

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
#: The interpreter cuts bfloat16 off where torch rounds.
TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.bfloat16: (2e-2, 2**-7), torch.float16: (1e-3, 2**-10)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the programs that run inside."""
    ran: list[str] = []
    fused = launch.fused
    for module in ("qk_norm_rope", "modulate", "guidance", "sample_logits"):
        wrapped = lambda name, *a, **k: (ran.append(name), fused(name, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(import_module(f"genkit.attention.kernels.{module}"), "fused", wrapped)
    yield ran


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """``both(f, ...)``: what the program gives, and the plain form."""

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
        with counted(monkeypatch) as ran:
            fused = function(*args, **options)
        assert len(ran) == 1, "the plain form ran"
        monkeypatch.setenv("GENKIT_KERNELS", "0")
        with counted(monkeypatch) as ran:
            plain = function(*args, **options)
        assert not ran
        monkeypatch.delenv("GENKIT_KERNELS")
        return fused, plain

    return run


def close(both: tuple[Any, Any], dtype: torch.dtype = torch.float32) -> None:
    atol, rtol = TOLERANCE[dtype]
    for fused, plain in zip(*([x] if isinstance(x, torch.Tensor) else x for x in both), strict=True):
        assert (fused is None) == (plain is None)
        if fused is not None:
            torch.testing.assert_close(fused, plain, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(72, 3, 1), (96, 2, 2)])
def test_qk_norm_rope(
    both: Any, monkeypatch: pytest.MonkeyPatch, dim: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("genkit.attention.kernels.triton_qk_norm_rope.TILE", 256)  # two heads a program
    projection = draw(2, 2, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q, k, _ = projection.unflatten(-1, (-1, dim)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    assert not q.is_contiguous()
    table = rope_table(4, dim, prefix=1)[:2]
    close(both(qk_norm_rope, q, k, table, norm="l2", q_weight=draw(heads, 1, seed=1)), dtype)
    close(both(qk_norm_rope, q, k, table, norm="rms", q_weight=draw(dim, seed=2), k_weight=draw(kv_heads, dim)), dtype)


def test_qk_norm_rope_of_odd_heads_and_of_rows_with_places_of_their_own(both: Any) -> None:
    close(both(qk_norm_rope, draw(2, 3, 2, 7), draw(2, 1, 2, 7, seed=1), norm="rms"))
    table = rope_table(4, 8, prefix=0)[torch.tensor([[0, 3], [2, 1]])]
    close(both(qk_norm_rope, draw(2, 3, 2, 8), draw(2, 1, 2, 8, seed=1).expand(2, 2, 2, 8), table))
    reversed_ = draw(8, 2, 3, 2).permute(3, 2, 1, 0)
    close(both(qk_norm_rope, reversed_, reversed_, table, norm="l2"))
    zeros = torch.zeros(1, 1, 2, 8)
    close(both(qk_norm_rope, zeros, zeros, norm="l2"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_modulate(both: Any, norm: str, dtype: torch.dtype) -> None:
    x, row, place = draw(2, 2, 72, dtype=dtype), draw(2, 1, 72, seed=1), draw(2, 2, 72, seed=2, dtype=dtype)
    close(both(modulate, x, row.to(dtype), place, norm=norm), dtype)
    close(both(modulate, x.transpose(0, 1), row[0], row[0], norm=norm, offset=0.0, eps=1e-3))
    close(both(gated_modulate, x, place, row.to(dtype), place, row[0, 0].to(dtype), norm=norm), dtype)


@pytest.mark.parametrize(("size", "dtype"), [(60, torch.float16), (60, torch.bfloat16), (5000, torch.float32)])
@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.0}, {"eta": 0.5, "momentum": -0.5, "threshold": 4.0}, {"threshold": 2.0}, {"eta": 0.0, "momentum": 0.5}],
)
def test_guidance(both: Any, options: dict[str, float], size: int, dtype: torch.dtype) -> None:
    cond, uncond = (draw(2, size, seed=i, dtype=dtype).unflatten(1, (5, -1)).transpose(1, 2) for i in range(2))
    average = draw(2, *cond.shape[1:], seed=3, dtype=dtype) if options.get("momentum") else None
    if average is None or dtype != torch.bfloat16:  # an average that is cut off, times w - 1, differs by more than a rounding
        close(both(guidance_update, cond, uncond, 4.0, average=average, **options), dtype)
    close(both(guidance_update, cond, uncond, torch.tensor([0.25, 1.5]), **options), dtype)


def test_guidance_of_large_samples_shares_its_sums(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.attention.kernels.triton_guidance.BLOCK", 64)
    monkeypatch.setattr("genkit.attention.kernels.triton_guidance.PARTS", 3)
    for size in (64, 200, 450, 513):  # also shares that begin beyond the end
        cond, uncond = draw(2, size), draw(2, size, seed=1)
        close(both(guidance_update, cond, uncond, 4.0, eta=0.0, momentum=0.5, threshold=4.0))


def test_guidance_without_a_direction(both: Any) -> None:
    zeros = torch.zeros(1, 4)
    close(both(guidance_update, zeros, draw(1, 4), 3.0, eta=0.0, threshold=1.0))
    close(both(guidance_update, zeros, zeros, 3.0, eta=0.0, threshold=1.0))


@pytest.mark.parametrize("order", ["llamagen", "var", "transformers"])
@pytest.mark.parametrize(("top_k", "top_p"), [(60, 1.0), (0, 0.9), (60, 0.6), (5, 1 - 1e-9), (0, 1e-6)])
def test_sample_logits(both: Any, order: str, top_k: int, top_p: float) -> None:
    logits = (draw(2, 700, seed=top_k) * 4).round() / 2  # many are equal
    waits = torch.empty(2, 700).exponential_(generator=torch.Generator().manual_seed(1))
    fused, plain = both(sample_logits, logits, waits, temperature=0.7, top_k=top_k, top_p=top_p, order=order)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("order", ["llamagen", "var"])
def test_sample_logits_keeps_the_same_set(both: Any, order: str) -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 1.0, -0.0, 1.0, 0.0, 2.0, -5.0]).repeat(9, 1)
    waits = torch.full((9, 9), 1e9).fill_diagonal_(1e-9)  # row i wants token i
    fused, plain = both(sample_logits, logits, waits, top_k=7, top_p=0.9, order=order)
    assert fused.tolist() == plain.tolist()


def test_sample_logits_of_a_large_vocabulary_with_guidance(both: Any) -> None:
    cond, uncond = draw(2, 16384 + 2)[:, 1:-1], draw(2, 16384, seed=1).bfloat16()
    waits = torch.empty(2, 16384).exponential_(generator=torch.Generator().manual_seed(1))
    options = {"uncond": uncond, "scale": torch.tensor([2.0, 0.3]), "top_k": 2000, "top_p": 0.95}
    fused, plain = both(sample_logits, cond, waits, **options)
    assert torch.equal(fused, plain)


def randomized(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that make every layer count."""
    source = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3, generator=source)
    return network.eval()


def of_network(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor], *names: str) -> None:
    with torch.no_grad(), counted(monkeypatch) as ran:
        fused = run()
        assert set(ran) == set(names)
        monkeypatch.setenv("GENKIT_KERNELS", "0")
        plain = run()
    assert plain.std() > 0.01
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=2e-5)


def test_var(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomized(VAR(VARConfig(2, 24, 2, (1, 2), 16, 4, num_classes=5)))
    inputs, label = draw(1, 5, 4), torch.tensor([3])
    of_network(monkeypatch, lambda: network(inputs, label).logits, "qk_norm_rope", "modulate")


def test_llamagen(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomized(LlamaGen(LlamaGenConfig(1, 2, 24, tokens=4, vocabulary=16, num_classes=5)))
    tokens, label = torch.tensor([[0, 3, 7], [0, 1, 2]]), torch.tensor([3, 1])
    of_network(monkeypatch, lambda: network(tokens, label).logits, "qk_norm_rope")
    monkeypatch.delenv("GENKIT_KERNELS")
    places = torch.tensor([[0, 1, 2], [0, 1, 1]])
    mask = torch.ones(3, 3).tril().bool()
    of_network(monkeypatch, lambda: network(tokens, label, mask=mask, positions=places).logits, "qk_norm_rope")


def test_flowar(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FlowARConfig(16, 2, 16, 1, cross=True, heads=2, patch_nums=(1, 2), channels=3, num_classes=5)
    network = randomized(FlowAR(config))
    x, t, z = draw(2, 4, 3), torch.tensor([0.3, 0.8]), draw(2, 4, 16, seed=1)
    of_network(monkeypatch, lambda: network.flownet(x, t, z), "qk_norm_rope", "modulate")


@pytest.mark.parametrize("filters", [Filters(0.8, 20, 0.9), Filters(top_k=20, order="var")])
def test_the_draws_of_a_run(monkeypatch: pytest.MonkeyPatch, filters: Filters) -> None:
    logits = draw(2, 1, 64)
    with counted(monkeypatch) as ran:
        drawn = Race([5, 6]).draw(logits, filters, 3)
    assert ran == ["sample_logits"]
    monkeypatch.setenv("GENKIT_KERNELS", "0")
    assert torch.equal(drawn, Race([5, 6]).draw(logits, filters, 3))


def test_apg_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Denoiser:
        path = VE

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return (x * condition[:, None]).sin()

    def run() -> torch.Tensor:
        conditions = {"cond": torch.tensor([1.0, 2.0]), "uncond": torch.tensor([0.5, 0.1])}
        guided = Guided(Denoiser(), APG(4.0, momentum=-0.5, threshold=2.0), conditions, 2)
        infos = [StepInfo(i, 2, 0.5, "step", 2.0 - i, 1.0 - i, 1.0, 2.0 - i, draw(2, 30, seed=i)) for i in range(2)]
        return torch.cat([guided(info).denoised for info in infos])

    of_network(monkeypatch, run, "guidance")


def test_gradients_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(1, 2, 4).requires_grad_()
    with counted(monkeypatch) as ran:
        modulate(x, torch.ones(4), torch.ones(4)).sum().backward()
        guidance_update(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, requires_grad=True), eta=0.0)
        modulate(x.detach().double(), torch.ones(4).double(), torch.ones(4).double())
    assert not ran
    assert x.grad is not None
