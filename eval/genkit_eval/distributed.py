"""The processes that torchrun or accelerate started together on one command: ``torchrun -m genkit_eval run ...``."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from genkit_eval.errors import InputError
from genkit_eval.world import Place, Together, World

_world = World()
_reason = ""


def world() -> World:
    """The processes of this command; outside of :func:`together` this one alone."""
    return _world


def restarted() -> bool:
    """Whether the launcher has started the processes again after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def complain(message: str, code: int) -> int:
    """Print an error, once for all processes, and return the exit code."""
    global _reason
    _reason = message
    if _world.first or _world.lost:
        print(f"genkit-eval: {message}", file=sys.stderr if _world.first else sys.__stderr__, flush=True)
    return code


def together(work: Callable[[], int]) -> int:
    """Run ``work``, which returns an exit code, in each process that the launcher started; all end with the first one's code.

    The others print nothing: why one of them failed is printed by the first, and only if that one is gone by themselves.
    """
    global _world
    try:
        place = Place.from_environment()
    except InputError as error:
        return complain(str(error), error.code)
    if place is None:
        return work()
    _use_own_gpu()
    _world = Together(place)
    try:
        code = _attempt(work)
        return _world.end(code, _reason)
    except InputError as error:
        return complain(str(error), error.code)
    except KeyboardInterrupt:
        return 130
    finally:
        _world = World()


def _attempt(work: Callable[[], int]) -> int:
    """``work``'s exit code, whatever it ends with."""
    with ExitStack() as quiet:
        if not _world.first:
            nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(redirect_stderr(nowhere))
        try:
            return work()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
        except Exception as error:
            traceback.print_exc(file=sys.__stderr__)
            global _reason
            _reason = f"{type(error).__name__}: {error}"
            return 1


def _use_own_gpu() -> None:
    """``cuda`` is another GPU for each process of a machine."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
