"""Commands that take the options of another one beside their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

Command = Callable[..., None]


def like(command: Command) -> Callable[[Command], Command]:
    """For ``tool(own..., **options)``: a command with the options of ``command`` behind its own, which it gets as ``options``."""

    def decorate(tool: Command) -> Command:
        own = inspect.signature(tool, eval_str=True).parameters
        shared = inspect.signature(command, eval_str=True).parameters
        kept = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
        found = [p.replace(kind=p.KEYWORD_ONLY) for p in [*kept, *(p for name, p in shared.items() if name not in own)]]

        @functools.wraps(tool)
        def call(**given: Any) -> None:
            tool(**given)

        call.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in found}
        return call

    return decorate
