"""Several attached pipelines at once: one guidance object for all, one inside another, in threads, around one network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import Tensor

from genkit.guidance import parse
from genkit.pipelines.attach import attach
from genkit.pipelines.attach.replace import replaced
from tests.attach.tiny import CASES, scheduler, sd

SD, XL, FLUX = CASES["sd"], CASES["sdxl"], CASES["flux"]
APG = parse("APG(3.0, momentum=-0.75, threshold=2.0)")  # keeps a running mean


def alone(case: Any, guidance: Any = APG, **options: Any) -> Tensor:
    with attach(options.get("pipe", case.pipe), guidance):
        return case(2.0, **options)


def test_two_attached_at_a_time() -> None:
    first, second = alone(SD), alone(FLUX)
    with attach(SD.pipe, APG) as one, attach(FLUX.pipe, APG) as two:
        assert torch.equal(SD(2.0), first)
        assert torch.equal(FLUX(2.0), second)
        assert torch.equal(SD(2.0), first)
    assert (one.nfe, two.nfe) == ([8] * 4, [8] * 2)


@pytest.mark.parametrize(("outer", "inner"), [("sd", "flux"), ("flux", "sd")])
def test_one_called_between_the_steps_of_another(outer: str, inner: str) -> None:
    """The momentum of one run never reaches the other, though the guidance is one object."""
    first, second, seen = alone(CASES[outer]), alone(CASES[inner]), list[Tensor]()

    def preview(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        seen.append(CASES[inner](2.0))
        return tensors

    with attach(CASES[outer].pipe, APG) as one, attach(CASES[inner].pipe, APG) as two:
        assert torch.equal(CASES[outer](2.0, callback_on_step_end=preview), first)
    assert len(seen) == 4
    assert all(torch.equal(s, second) for s in seen)
    assert one.nfe == [8, 8]
    assert two.nfe == [8] * 8


def sharing() -> Any:
    """Another pipeline around the same network."""
    pipe = sd(unet=SD.pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_that_shares_the_network_is_called_between_the_steps() -> None:
    """Whether it is attached or not, its calls are its own."""
    before, first, pipe, seen = SD(3.0), alone(SD), sharing(), list[Tensor]()
    state, plain = dict(SD.pipe.unet.__dict__), alone(SD, "CFG(4.0)")

    def preview(other: Any, step: int, t: Any, tensors: Any) -> Any:
        seen.append(SD(2.0, pipe=pipe))
        return tensors

    with attach(SD.pipe, APG) as one, attach(pipe, "CFG(4.0)") as two:
        got = SD(2.0, callback_on_step_end=preview)
    assert torch.equal(got, first)
    assert all(torch.equal(s, plain) for s in seen)
    assert (one.nfe, two.nfe) == ([8, 8], [8] * 8)
    assert SD.pipe.unet.__dict__ == state
    assert torch.equal(SD(3.0), before)


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "PNDM"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_foreign_call_of_the_network_is_never_taken_for_a_step(kind: str, steps: int) -> None:
    """Which of the two calls is the pipeline's own cannot be told: better an error than another image."""
    pipes = [sd(unet=SD.pipe.unet, scheduler=scheduler(getattr(diffusers, f"{kind}Scheduler"))) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    own = SD(3.0, pipe=pipes[0])

    def preview(other: Any, step: int, t: Any, tensors: Any) -> Any:
        SD(2.0, pipe=pipes[1], num_inference_steps=steps)
        return tensors

    with attach(pipes[0], APG), pytest.raises(ValueError, match=r"twice in one step: .*around the same network.*a copy"):
        SD(2.0, pipe=pipes[0], callback_on_step_end=preview)
    assert torch.equal(SD(3.0, pipe=pipes[0]), own)


def in_threads(*jobs: Any) -> list[Any]:
    """What the jobs return, begun together and each in its own thread."""
    barrier = Barrier(len(jobs))

    def begin(job: Any) -> Any:
        barrier.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(begin, jobs))


def test_two_threads_with_a_pipeline_each() -> None:
    guidances = {"sd": APG, "sdxl": parse("Sum(CFG(2.0), PAG(2.0))"), "flux": APG, "qwen": "Adaptive(CFG(3.0), 0.5)"}
    expected = {name: alone(CASES[name], guidance) for name, guidance in guidances.items()}
    modules = {name: [(m, dict(m.__dict__)) for m in CASES[name].pipe.unet.modules()] for name in ("sd", "sdxl")}

    def job(name: str) -> Any:
        return lambda: [alone(CASES[name], guidances[name]) for _ in range(3)]

    for pair in (("sd", "flux"), ("sdxl", "sd"), ("flux", "qwen")):
        for name, results in zip(pair, in_threads(*map(job, pair)), strict=True):
            assert all(torch.equal(got, expected[name]) for got in results), name
    assert all(m.__dict__ == state for found in modules.values() for m, state in found)


def test_threads_around_one_network() -> None:
    """Attached or not, weakened or not: each thread has the network it would have alone."""
    case = SD
    net, weak = case.pipe.unet, parse("Sum(CFG(2.0), PAG(2.0))")
    states = [(m, dict(m.__dict__)) for m in net.modules()]
    pipes = [sharing() for _ in range(3)]
    expected = [alone(case, weak), alone(case, APG), case(3.0)]
    jobs = (
        lambda: [alone(case, weak, pipe=pipes[0]) for _ in range(3)],
        lambda: [alone(case, APG, pipe=pipes[1]) for _ in range(4)],
        lambda: [case(3.0, pipe=pipes[2]) for _ in range(6)],
    )
    for one, results in zip(expected, in_threads(*jobs), strict=True):
        assert all(torch.equal(got, one) for got in results)
    assert all(m.__dict__ == state for m, state in states)


def test_a_method_is_put_back_in_whichever_order() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    first, second = (replaced(net, "forward", lambda original, args, _, k=k: k * original(*args)) for k in (2, 3))
    x = torch.ones(1, 1)
    own = net(x)
    first.__enter__()
    second.__enter__()
    assert torch.equal(net(x), 3 * own), "the second stands on the original"
    first.__exit__(None, None, None)
    assert torch.equal(net(x), 3 * own)
    second.__exit__(None, None, None)
    assert "forward" not in net.__dict__
    assert torch.equal(net(x), own)
