"""Processes for the tests of distributed runs: one that has imported everything forks the others, so that they start at once.

``python -m tests.eval.crowd`` reads orders as lines of JSON: {"start": order} answers with a process number, {"wait": it,
"seconds": s} with its exit code (negative: the signal), or null if it is still there after s seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 4
ROOT = Path(__file__).parents[2]


def tiny_run(out: Path, texts: Sequence[str], n: int, pipe: Any, tolerant: bool = False) -> dict[str, Any]:
    """The run that is compared: stand-ins for network and reference, blocks of ``BLOCK`` images."""
    import torch
    from genkit_eval.extractors import Extractor
    from genkit_eval.metrics import Sample
    from genkit_eval.metrics.moments import moments_of
    from genkit_eval.references import Reference
    from genkit_eval.run import Request, make_config, run
    from genkit_eval.score import Bootstrap

    from genkit.guidance import parse
    from tests.eval.standins import tiny_features

    pixels = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    real = tiny_features(pixels)
    reference = Reference(Sample(real, moments=moments_of(real)), "fake/reference", "a" * 64, 60, "random noise")
    extractor = Extractor("fake/projection", "TINY", "e" * 64, "none", tiny_features)
    config = make_config(pipe, extractor, "heun", 3, 0, "balanced", BLOCK)
    request = Request(tuple((text, parse(text)) for text in texts), n, out, Bootstrap(5), progress=False, tolerant=tolerant)
    return run(pipe, extractor, reference, config, request)


def tiny_network(log: Path) -> Any:
    """An extractor that logs how many images go through it."""
    from genkit_eval.extractors import Extractor

    from tests.eval.standins import tiny_features

    def features(pixels: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()} images {len(pixels)}\n")
        return tiny_features(pixels)

    return Extractor("fake/projection", "TINY", "e" * 64, "none", features)


def scoring(order: dict[str, Any]) -> int:
    """What a forked process does that is given a command line: just that, with the tiny network and no report."""
    from genkit_eval.cli import invoke
    from genkit_eval.distributed import together
    from genkit_eval.extractors import EXTRACTORS
    from genkit_eval.report import build

    os.environ["GENKIT_CACHE"] = order["cache"]
    EXTRACTORS["builtin/cifar10"] = lambda options: tiny_network(Path(order["log"]))
    build.build_report = lambda out: out / "report.html"
    return together(lambda: invoke(order["command"]))


def work(order: dict[str, Any]) -> int:
    """What a forked process does: its part of ``tiny_run``, with a log of the blocks that it begins."""
    from genkit_eval import provenance
    from genkit_eval.distributed import complain, together, world
    from genkit_eval.errors import InputError

    from tests.eval.standins import FakePipeline

    class Logged(FakePipeline):
        def __call__(self, classes: Sequence[int | str], seeds: Sequence[int], guidance: Any, **options: Any) -> Any:
            with Path(order["log"]).open("a") as log:
                log.write(f"{os.getpid()} {guidance!r} {seeds[0]}\n")
            time.sleep(order.get("pause", 0.0))
            error = order.get("errors", {}).get(str(world().rank))
            if error and repr(guidance) == order.get("only", repr(guidance)):
                raise {"ValueError": ValueError, "RuntimeError": RuntimeError, "OSError": OSError}[error](f"{error} on purpose")
            return super().__call__(classes, seeds, guidance, **options)

    def command() -> int:
        print(f"begin {world().rank}", flush=True)
        try:
            tiny_run(Path(order["out"]), order["texts"], order["n"], Logged(), order.get("tolerant", False))
        except InputError as error:
            return complain(str(error), error.code)
        return 0

    # The checkout may change while others work in it, and asking git takes longer than the run.
    provenance.git_commit = lambda: None
    return together(command)


def _child(order: dict[str, Any]) -> None:
    os.environ.update(order["env"])
    stream = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    code = 99
    try:
        code = scoring(order) if "command" in order else work(order)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(pid: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.01)


def serve() -> None:
    """Fork and wait as asked, until the input ends."""
    for name in ("torch.distributed", "genkit_eval.commands.score", "genkit_eval.cli", "tests.eval.standins"):
        importlib.import_module(name)
    running = set[int]()
    for line in sys.stdin:
        asked = json.loads(line)
        answer: int | None
        if "start" in asked:
            answer = os.fork()
            if answer == 0:
                _child(asked["start"])
            running.add(answer)
        else:
            answer = _wait(asked["wait"], asked["seconds"])
            if answer is not None:
                running.discard(asked["wait"])
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Process:
    """One process of a world, where its output goes, and its exit code once it was waited for."""

    crowd: Crowd
    pid: int
    output: Path
    code: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it was waited for: then its number may be another's."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 300.0) -> int | None:
        """Exit code, negative for a signal; None when it is still there."""
        if self.code is None:
            self.code = self.crowd.ask({"wait": self.pid, "seconds": seconds})
        return self.code

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


class Crowd:
    """The process that forks the others."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.eval.crowd"], stdin=pipe, stdout=pipe, cwd=ROOT, env=environment, text=True
        )

    def ask(self, question: dict[str, Any]) -> int | None:
        """The server's answer."""
        to, back = self.server.stdin, self.server.stdout
        assert to is not None
        assert back is not None
        to.write(json.dumps(question) + "\n")
        to.flush()
        answer: int | None = json.loads(back.readline())
        return answer

    def start(self, ranks: Sequence[int], size: int, port: int, out: Path, opens: bool = False, **order: Any) -> list[Process]:
        """Start these of ``size`` processes. ``opens``: rank 0 opens the store, instead of a launcher."""
        found = []
        for rank in ranks:
            env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(not opens)}
            env |= {"GENKIT_DIST_TIMEOUT": str(order.get("timeout", 600))}
            output = out.with_name(f"{out.name}.{rank}.{time.monotonic_ns()}.txt")
            full = {**order, "env": env, "out": str(out), "output": str(output), "log": str(out.with_name(f"{out.name}.log"))}
            pid = self.ask({"start": full})
            assert pid
            found.append(Process(self, pid, output))
        return found

    def close(self) -> None:
        """End it and all that it started."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


if __name__ == "__main__":
    serve()
