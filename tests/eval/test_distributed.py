"""Several processes on one run: the numbers of one, whatever dies and when, and no waiting for what is gone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genkit_eval import provenance
from genkit_eval.cli import invoke
from genkit_eval.extractors import EXTRACTORS
from genkit_eval.report import build
from safetensors.torch import load_file

from tests.eval.crowd import BLOCK, ROOT, Crowd, Process, tiny_network, tiny_run
from tests.eval.standins import FakePipeline

TEXTS = ("none", "CFG(2.0)")


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    yield crowd
    crowd.close()


@pytest.fixture(scope="module")
def store() -> Iterator[int]:
    """The port of a store that outlives the processes, as that of torchrun does."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    yield server.port
    del server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes, for a number of images."""
    folder = tmp_path_factory.mktemp("alone")

    def make(n: int, texts: tuple[str, ...] = TEXTS) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(provenance, "git_commit", lambda: None)
            tiny_run(folder / str(n), texts, n, FakePipeline())
        return folder / str(n)

    return make


def numbers(out: Path) -> list[dict[str, Any]]:
    """Entries of the results without what a clock measured."""
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete"
    for entry in results["guidances"]:
        for key in ("seconds_wall", "seconds_cpu"):
            entry["cost"].pop(key)
        entry.pop("made_with", None)
    found: list[dict[str, Any]] = results["guidances"]
    return found


def same(out: Path, other: Path) -> None:
    """Every number is the same, and so is every bit of images and features."""
    assert numbers(out) == numbers(other)
    blocks = [sorted(path.relative_to(o) for path in o.glob("*/blocks/*.safetensors")) for o in (out, other)]
    assert blocks[0] == blocks[1] != []
    for name in blocks[0]:
        ours, theirs = load_file(out / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def begun(out: Path) -> list[tuple[int, str]]:
    """(process, block) in the order in which they were begun."""
    log = out.with_name(f"{out.name}.log")
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines]


def said(processes: list[Process]) -> str:
    return "\n".join(process.said for process in processes)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_make_what_one_makes(size: int, crowd: Crowd, store: int, tmp_path: Path, alone: Any) -> None:
    out = tmp_path / "run"
    processes = crowd.start(range(size), size, store, out, texts=TEXTS, n=38)
    assert [process.wait() for process in processes] == [0] * size, said(processes)
    same(out, alone(38))
    makers = Counter(pid for pid, _ in begun(out))
    # Ten blocks of each guidance, block i by process i modulo their number.
    shares = [2 * len(range(rank, 10, size)) for rank in range(size)]
    assert [makers[process.pid] for process in processes] == shares
    # Only the first one has something to say.
    assert [process.said for process in processes] == ["begin 0\n", *[""] * (size - 1)]


def test_twenty_kills_change_no_number(crowd: Crowd, store: int, tmp_path: Path, alone: Any) -> None:
    draw = random.Random(20)
    out, n, kills, rounds = tmp_path / "run", 40 * BLOCK, 0, 0
    moments = sorted(draw.randrange(2 * 38) for _ in range(20))
    while kills < 20:
        rounds += 1
        size = draw.choice([2, 2, 3])
        processes = crowd.start(range(size), size, store, out, texts=TEXTS, n=n, pause=0.02)
        over = wait_for_blocks(out, moments[kills], processes)
        time.sleep(draw.choice([0.0, 0.01, 0.05, 0.2]))
        victims = processes if draw.random() < 0.4 else [draw.choice(processes)]
        for process in victims:
            process.kill()
        # As torchrun does when one is gone.
        for process in processes:
            process.kill(signal.SIGTERM)
        codes = [process.wait() for process in processes]
        assert {*codes} <= {0, -signal.SIGKILL, -signal.SIGTERM}, said(processes)
        if over or codes.count(0):
            # They were done before they could be killed: more images, so that there is something to do.
            n += 4 * BLOCK
        else:
            kills += 1
        assert rounds < 60
    processes = crowd.start(range(2), 2, store, out, texts=TEXTS, n=n)
    assert [process.wait() for process in processes] == [0, 0], said(processes)
    same(out, alone(n))
    assert not list(out.glob("**/*.writing"))
    repeated = Counter[int]()
    last: dict[str, int] = {}
    for pid, block in begun(out):
        if block in last:
            repeated[last[block]] += 1
        last[block] = pid
    assert {*repeated.values()} <= {1}
    assert len(last) == 2 * n // BLOCK


def wait_for_blocks(out: Path, count: int, processes: list[Process]) -> bool:
    """Wait until so many blocks were begun, by these processes or before; whether these ended first."""
    until = time.monotonic() + 300
    while len({block for _, block in begun(out)}) < count and time.monotonic() < until:
        if processes[0].wait(0.0) is not None:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize(
    ("errors", "code", "message"),
    [
        ({"0": "ValueError"}, 2, "genkit-eval: --guidance 'none': ValueError on purpose"),
        ({"1": "ValueError"}, 2, "genkit-eval: rank 1: --guidance 'none': ValueError on purpose"),
        ({"1": "OSError"}, 2, "genkit-eval: rank 1: --out: cannot write in"),
        ({"1": "RuntimeError"}, 1, "genkit-eval: rank 1: RuntimeError: RuntimeError on purpose"),
        ({"0": "RuntimeError"}, 1, "RuntimeError: RuntimeError on purpose"),
    ],
)
def test_an_error_ends_all_and_is_said_once(
    errors: dict[str, str], code: int, message: str, crowd: Crowd, store: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    processes = crowd.start(range(3), 3, store, out, texts=TEXTS, n=40, errors=errors, pause=0.2)
    assert [process.wait() for process in processes] == [code] * 3, said(processes)
    assert processes[0].said.count(message) == 1, processes[0].said
    traceback = "1" in errors and code == 1
    assert ("Traceback" in processes[1].said) == traceback
    assert "genkit-eval" not in processes[1].said + processes[2].said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_one_process_refuses_is_left_out_by_all(rank: str, crowd: Crowd, store: int, tmp_path: Path, alone: Any) -> None:
    refusal: dict[str, Any] = {"errors": {rank: "ValueError"}, "only": "CFG(scale=3.0)", "tolerant": True}
    out = tmp_path / "run"
    texts = (TEXTS[0], "CFG(3.0)", TEXTS[1])
    processes = crowd.start(range(3), 3, store, out, texts=texts, n=38, **refusal)
    assert [process.wait() for process in processes] == [0] * 3, said(processes)
    assert [entry["label"] for entry in numbers(out)] == list(TEXTS)
    assert numbers(out) == numbers(alone(38))


def test_records_of_an_earlier_start_do_not_count(crowd: Crowd, tmp_path: Path) -> None:
    server = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for rank in (0, 1):
        server.set(f"genkit/{rank}", json.dumps({"identity": "old", "step": 9, "code": 2, "reason": "old"}))
    order: dict[str, Any] = {"texts": TEXTS[:1], "n": 12}
    late = crowd.start([1], 2, server.port, tmp_path / "run", **order)
    until = time.monotonic() + 120
    while (record := json.loads(server.get("genkit/1")))["identity"] == "old" or not record["step"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    # Now it waits for the first one, and has time to take the old record for its.
    time.sleep(1.0)
    processes = [*crowd.start([0], 2, server.port, tmp_path / "run", **order), *late]
    assert [process.wait() for process in processes] == [0, 0], said(processes)
    assert len({pid for pid, _ in begun(tmp_path / "run")}) == 2


def test_features_of_existing_images_are_shared_out(
    crowd: Crowd, store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    np.savez(tmp_path / "others.npz", arr_0=pixels[::-1] // 2)
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EXTRACTORS, "builtin/cifar10", lambda options: tiny_network(tmp_path / "one.log"))
    monkeypatch.setattr(build, "build_report", lambda out: out / "report.html")

    def commands(name: str) -> list[list[str]]:
        reference = ["reference", "build", f"npz:{tmp_path / 'images.npz'}", "--out", str(tmp_path / f"{name}.safetensors")]
        against = ["--reference", str(tmp_path / "one.safetensors"), "--bootstrap", "0", "--out", str(tmp_path / name)]
        return [reference, ["score", f"npz:{tmp_path / 'others.npz'}", *against]]

    assert [invoke(command) for command in commands("one")] == [0, 0]
    shared = {"cache": str(tmp_path / "cache2")}
    for command in commands("two"):
        processes = crowd.start(range(2), 2, store, tmp_path / "two", command=command, **shared)
        assert [process.wait() for process in processes] == [0, 0], said(processes)
        assert processes[1].said == ""
    # Blocks of 256: the first process has the first and the third, the second one the other.
    seen = Counter[int]()
    for pid, text in begun(tmp_path / "two"):
        seen[pid] += int(text.split()[1])
    assert sorted(seen.values()) == [256, 256, 344, 344]
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    found = [json.loads((tmp_path / name / "results.json").read_text())["guidances"] for name in ("one", "two")]
    assert found[0] == found[1]
    lacking = crowd.start(range(2), 2, store, tmp_path / "two", command=[*commands("two")[1], "--no-cache"], **shared)
    assert [process.wait() for process in lacking] == [2, 2], said(lacking)
    assert said(lacking).count("--no-cache: several processes exchange features through the cache") == 1


LOSSES = {
    "never started": (2, "genkit-eval: rank 1: no sign of life since the start"),
    "stopped": (2, "genkit-eval: rank 1: no sign of life since 8 s"),
    "killed": (2, "genkit-eval: rank 1: no sign of life since 8 s"),
    "first killed": (2, "genkit-eval: rank 0: no sign of life since 8 s"),
    "first killed with the store": (2, "genkit-eval: rank 0: it or its launcher is gone: rank 1 cannot reach"),
    "first stopped with the store": (2, "genkit-eval: rank 0: it or its launcher is gone: rank 1 cannot reach"),
}


@pytest.fixture(scope="module")
def losses(crowd: Crowd, store: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | None, str]]:
    """Exit code and words of the process that is left, case by case; all at the same time, as they do nothing but wait."""
    worlds = {}
    for name in LOSSES:
        out = tmp_path_factory.mktemp("loss") / "run"
        opens = name.endswith("with the store")
        server = None if opens else torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        port = free_port() if server is None else server.port
        ranks = [0] if name == "never started" else [0, 1]
        worlds[name] = (server, out, crowd.start(ranks, 2, port, out, opens, texts=TEXTS, n=4000, pause=0.5, timeout=8))
    found = {}
    for name, (_, out, processes) in worlds.items():
        if len(processes) > 1:
            wait_for_both(out, processes)
            lost = processes[0 if name.startswith("first") else 1]
            lost.kill(signal.SIGSTOP if "stopped" in name else signal.SIGKILL)
    for name, (_, _, processes) in worlds.items():
        left = processes[1 if name.startswith("first") else 0]
        found[name] = (left.wait(120), left.said)
        for process in processes:
            process.kill()
            process.wait()
    return found


def wait_for_both(out: Path, processes: list[Process]) -> None:
    until = time.monotonic() + 120
    while len({pid for pid, _ in begun(out)}) < 2 and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("name", LOSSES)
def test_a_process_that_is_gone_is_named(name: str, losses: dict[str, tuple[int | None, str]]) -> None:
    code, words = losses[name]
    assert (code, words.count(LOSSES[name][1])) == (LOSSES[name][0], 1), words


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    # One thread each, as torchrun has it: with others, a network's features may differ in their last bits.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def command(launcher: list[str], name: str, guidance: str = "CFG(2.0)") -> subprocess.CompletedProcess[str]:
        counts = ["--num-samples", "14", "--block-size", "4", "--steps", "2", "--bootstrap", "4"]
        options = ["-m", "genkit_eval", "run", "--guidance", guidance, *counts, "--out", str(tmp_path / name)]
        return subprocess.run(
            [sys.executable, *launcher, *options], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )

    for done in (command([], "one"), command(torchrun, "two")):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
    same(tmp_path / "two", tmp_path / "one")
    refused = command(torchrun, "three", "CFG(")
    assert refused.returncode != 0
    assert refused.stderr.count("genkit-eval: --guidance: ") == 1
