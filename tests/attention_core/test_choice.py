"""Who says which backend computes, and what happens to one that is missing or broken."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genkit.attention import (
    BACKENDS,
    AttentionBackend,
    BlockCausal,
    Causal,
    Mask,
    Request,
    Tree,
    Unavailable,
    attention,
    choice,
    chosen,
    overrides,
    report,
    set_attention,
    use_attention,
)
from genkit.attention.base import AUTOMATIC, REASONS
from genkit.models.llamagen import LlamaGen, LlamaGenConfig

X = torch.zeros(1, 1, 3, 4)


class Constant(AttentionBackend):
    """Answers with a number of its own."""

    def __init__(self, number: int) -> None:
        self.name, self.number = f"constant{number}", number

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        return torch.full_like(q, self.number)


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backends 1 to 4, which answer with these numbers; what is known of the others is forgotten afterwards."""
    for n in range(1, 5):
        monkeypatch.setitem(BACKENDS, f"constant{n}", Constant(n))
    monkeypatch.setattr(choice, "_environment", "auto")
    before = dict(REASONS)
    yield
    REASONS.clear()
    REASONS.update(before)


def answer(**kwargs: str) -> float:
    return float(attention(X, X, X, **kwargs)[0, 0, 0, 0])


def test_the_call_comes_before_the_context_the_network_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_environment", "constant4")
    with use_attention("constant2"):
        assert answer(backend="constant1", default="constant3") == 1
        assert answer(default="constant3") == 2
        with use_attention("auto"):
            assert answer(default="constant3") == 0
        assert answer() == 2
    assert answer(default="constant3") == 3
    assert answer() == 4
    assert answer(backend="auto") == 0


def test_the_context_is_left_when_something_fails() -> None:
    with pytest.raises(RuntimeError, match="inside"), use_attention("constant1"):
        raise RuntimeError("inside")
    assert answer() == 0


def test_threads_do_not_see_each_others_choice() -> None:
    barrier = threading.Barrier(3)

    def work(n: int) -> list[float]:
        with use_attention(f"constant{n}"):
            barrier.wait(60)
            return [answer() for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(work, n) for n in (1, 2)]
        barrier.wait(60)
        assert answer() == 0
        assert [set(f.result()) for f in found] == [{1.0}, {2.0}]


def small() -> LlamaGen:
    torch.manual_seed(0)
    config = LlamaGenConfig(2, 2, 16, tokens=16, vocabulary=16, num_classes=3)
    return LlamaGen(config).eval()


def test_a_network_asks_for_a_backend_of_its_own() -> None:
    net, other = small(), small()
    inputs, label = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    before = net(inputs, label).hidden
    set_attention(net, "constant3")
    assert set(overrides(net).values()) == {"constant3"}
    assert not torch.equal(net(inputs, label).hidden, before)
    assert torch.equal(other(inputs, label).hidden, before)
    with use_attention("sdpa"):
        assert torch.equal(net(inputs, label).hidden, before)
    assert chosen(net)["networks_ask_for"] == ["constant3"]
    set_attention(net, None)
    assert torch.equal(net(inputs, label).hidden, before)
    assert not overrides(net)
    with pytest.raises(ValueError, match="network is a Linear, of which no layer"):
        set_attention(nn.Linear(2, 2), "sdpa")
    with pytest.raises(Unavailable, match="backend='nothing' is no attention backend"):
        set_attention(net, "nothing")


def test_unknown_names_are_refused_where_they_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "is no attention backend; use auto, .*reference, sdpa, .*flash"
    with pytest.raises(Unavailable, match=f"'flsh' {known}"):
        answer(backend="flsh")
    with pytest.raises(Unavailable, match=f"use_attention\\('flsh'\\) {known}"), use_attention("flsh"):
        pass
    monkeypatch.setattr(choice, "_environment", "flsh")
    for _ in range(2):
        with pytest.raises(Unavailable, match=f"GENKIT_ATTENTION=flsh {known}"):
            answer()
    assert answer(backend="constant1") == 1


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == {"backend": "auto", "asked_by": "default", "torch": torch.__version__}
    monkeypatch.setattr(choice, "_environment", "sdpa:math")
    assert (chosen()["backend"], chosen()["asked_by"]) == ("sdpa:math", "GENKIT_ATTENTION")
    with use_attention("reference"):
        assert (chosen()["backend"], chosen()["asked_by"]) == ("reference", "use_attention")


def package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text if name != "xformers" else "")
    if name == "xformers":
        (folder / name / "ops.py").write_text(text)


NO_OPERATOR = """
def memory_efficient_attention(*args, **kwargs):
    raise NotImplementedError("No operator found\\nfor these inputs")
"""
BROKEN = {
    "xformers": [
        ("raise ImportError('undefined symbol')", "ImportError: undefined symbol"),
        ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart"),
        ("import torch; torch.nothing", "AttributeError: module 'torch'"),
        (NO_OPERATOR, "NotImplementedError: No operator found"),
    ],
    "sage": [("raise OSError('libcuda.so')", "OSError: libcuda.so"), ("", "AttributeError")],
    "flash": [("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol")],
}
PACKAGES = {"xformers": "xformers", "sage": "sageattention", "flash": "flash_attn"}


@pytest.mark.parametrize(("name", "text", "said"), [(name, *case) for name, found in BROKEN.items() for case in found])
def test_a_broken_backend_is_reported_once(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(tmp_path, PACKAGES[name], text)
    monkeypatch.syspath_prepend(tmp_path)
    REASONS.pop(name, None)
    try:
        with pytest.warns(RuntimeWarning, match=f"'{name}' is skipped: it is broken: {said}"):
            report()
        assert answer() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report()
            with pytest.raises(Unavailable, match=f"use_attention.*cannot be used: it is broken: {said}.*Use auto"):
                use_attention(name).__enter__()
            with pytest.raises(Unavailable, match=f"{name!r} cannot be used: it is broken"):
                answer(backend=name)
        lines = capsys.readouterr().out.splitlines()
        assert next(line for line in lines if line.startswith(f"  {name} ")).split()[1] == "no"
    finally:
        for loaded in [m for m in sys.modules if m.partition(".")[0] == PACKAGES[name]]:
            del sys.modules[loaded]


def test_a_broken_backend_of_the_automatic_choice_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Constant):
        def available(self) -> str | None:
            raise RuntimeError("no kernel image")

        def automatic(self, request: Request) -> bool:
            return True

    broken = Broken(5)
    monkeypatch.setitem(BACKENDS, "constant5", broken)
    monkeypatch.setattr(choice, "AUTOMATIC", [broken, *AUTOMATIC])
    mask = BlockCausal((1, 2))
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        first = attention(X, X, X, mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(X, X, X, mask=mask), first)


def test_the_automatic_choice() -> None:
    def pick(device: str, q_len: int, mask: Mask | None, k_len: int = 4096) -> str:
        return choice.best(Request(device, torch.float16, 2, 4, 4, q_len, k_len, 64, 64, mask, False)).name

    blocks, tree = BlockCausal((2048, 2048)), Tree((-1, -1, 0))
    assert [pick("cpu", 4096, mask) for mask in (None, Causal(), blocks, tree)] == ["sdpa"] * 4
    assert [pick("cuda", 4096, mask) for mask in (None, Causal(), blocks, tree)] == ["sdpa", "sdpa", "flex", "flex"]
    assert [pick("cuda", 64, mask) for mask in (blocks, tree)] == ["sdpa", "sdpa"]


def test_the_report_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    report()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(BACKENDS)
    assert next(line for line in lines if line.startswith("  sdpa ")).split()[1] == "yes"


def fresh(statement: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", statement], env=env, capture_output=True, text=True)


def test_the_report_needs_no_metadata_of_what_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise PackageNotFoundError("constant1")

    monkeypatch.setattr(BACKENDS["constant1"], "version", missing)
    monkeypatch.setattr(choice, "_environment", "constant1")
    report()
    assert "'backend': 'constant1', 'asked_by': 'GENKIT_ATTENTION'" in capsys.readouterr().out


def test_nothing_optional_is_imported_and_a_bad_variable_waits(tmp_path: Path) -> None:
    for name in PACKAGES.values():
        package(tmp_path, name, f"raise SystemExit('{name} was imported')")
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    done = fresh(
        "import genkit, sys\nassert 'torch' not in sys.modules\n"
        "import torch, genkit.attention as a\nx = torch.zeros(1, 1, 2, 4)\na.attention(x, x, x, backend='sdpa')\n"
        "try: a.attention(x, x, x)\nexcept ValueError as error: print(error)",
        PYTHONPATH=path,
        GENKIT_ATTENTION="nonsense",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GENKIT_ATTENTION=nonsense is no attention backend; use auto, ")
