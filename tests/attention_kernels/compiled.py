"""The Triton programs compile for a GPU: run by test_interpreter.py in a process of its own. No GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genkit.attention.kernels import triton_guidance, triton_modulate, triton_qk_norm_rope, triton_sample_logits

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int64: "*i64"}
OPTIONS = ("num_warps", "enable_fp_fusion")


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches compile only, for Hopper; the assembly of each."""
    found: list[str] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k not in OPTIONS}
        assert sorted(values) == sorted(self.arg_names)
        signature, constants = {}, {}
        for name, parameter in zip(self.arg_names, self.params, strict=True):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif parameter.is_constexpr or (isinstance(value, int) and value == 1):  # as a launch specializes
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self, signature=signature, constexprs=constants)
        options = {k: v for k, v in named.items() if k in OPTIONS}
        found.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return found


@pytest.mark.parametrize(("dim", "heads", "norm"), [(72, 16, "l2"), (64, 1, "rms")])
def test_qk_norm_rope(launched: list[str], dim: int, heads: int, norm: str) -> None:
    q, k = torch.empty(2, heads, 3, dim, dtype=torch.bfloat16), torch.empty(2, 1, 3, dim, dtype=torch.bfloat16)
    triton_qk_norm_rope.run(q, k, torch.empty(3, dim // 2, 2), norm, 1e-6, torch.empty(heads, dim), None)
    assert len(launched) == 1


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_modulate(launched: list[str], norm: str) -> None:
    x, row = torch.empty(2, 5, 1152, dtype=torch.bfloat16), torch.empty(2, 1, 1152).expand(2, 5, 1152)
    gated = (None, None) if norm == "rms" else (x, row)
    triton_modulate.run(x, row, row, *gated, norm, 1.0, 1e-6, torch.float32, torch.bfloat16)
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance(launched: list[str], dtype: torch.dtype) -> None:
    c, scales = torch.empty(2, 4, 32, 32, dtype=dtype), torch.empty(2)
    triton_guidance.run(c, c, scales, 1.0, 0.0, 0.0, None)
    triton_guidance.run(c, c, 4.0, 0.0, -0.5, 5.0, c)
    triton_guidance.run(c, c, scales, 0.5, 0.0, 0.0, None)
    assert len(launched) == 5


@pytest.mark.parametrize(
    ("size", "top_k", "top_p", "order"), [(16384, 2000, 0.9, "llamagen"), (4096, 1, 0.9, "transformers"), (500, 0, 0.9, "var")]
)
def test_sample_logits(launched: list[str], size: int, top_k: int, top_p: float, order: str) -> None:
    c, waits = torch.empty(2, size), torch.empty(2, size)
    guided = order != "var"
    triton_sample_logits.run(c, c.bfloat16() if guided else None, waits, torch.empty(2), 0.7, top_k, top_p, order)
    assert len(launched) == 1
