"""Guidance written as text, ``Interval(APG(4.0), 0.28, 5.42)``: parsed into registered classes, never run as code."""

from __future__ import annotations

import ast
import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from genkit.guidance.base import Guidance, signature

MAX_LENGTH = 50_000  # a fitted LinearAG of 100 steps has 20,000
MAX_DEPTH = 20


def build(text: str, names: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """The object an expression describes: calls of the given names with numbers, strings, True/False/None, lists and each other.

    Args:
        text: at most 50,000 characters, nested at most 20 deep.
        names: what may be called.
        what: the argument's name, for messages.

    Raises:
        ValueError: anything else in the text, an unknown name (with the nearest known ones), or arguments a class refuses.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what}={text!r} must be an expression such as {_example(names)}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{what} is {len(text)} characters long; at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(text := text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{what}={_short(text)!r} is not an expression ({getattr(error, 'msg', error)}); write {_example(names)}"
        ) from None
    return _Builder(text, names, what).value(tree.body, 0)


def _example(names: Mapping[str, Callable[..., Any]]) -> str:
    return "'Interval(APG(4.0), 0.28, 5.42)'" if "APG" in names else repr(f"{next(iter(names), 'name')}()")


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Builder:
    def __init__(self, text: str, names: Mapping[str, Callable[..., Any]], what: str) -> None:
        self.text, self.names, self.what = text, names, what

    def value(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{self.what}={_short(self.text, 60)!r} is nested more than {MAX_DEPTH} deep")
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            number = self.value(node.operand, depth + 1)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, ast.List | ast.Tuple):
            return tuple(self.value(item, depth + 1) for item in node.elts)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return math.inf if node.id == "inf" else math.nan
        if isinstance(node, ast.Name):
            if node.id in self.names:
                return self.make(node.id, [], {})
            raise ValueError(self.unknown(node.id))
        raise ValueError(
            f"{self.what}: {self.source(node)!r} is not allowed; only names from the list below, numbers and strings are. "
            f"Known names: {', '.join(sorted(self.names))}"
        )

    def call(self, node: ast.Call, depth: int) -> Any:
        if not isinstance(node.func, ast.Name):
            raise ValueError(
                f"{self.what}: {self.source(node.func)!r} cannot be called; known names: {', '.join(sorted(self.names))}"
            )
        if node.func.id not in self.names:
            raise ValueError(self.unknown(node.func.id))
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise ValueError(f"{self.what}: * and ** are not allowed in {self.source(node)!r}")
        for name, times in Counter(str(k.arg) for k in node.keywords).items():
            if times > 1:
                raise ValueError(f"{self.what}: {_short(name)} is given twice in {self.source(node)!r}")
        args = [self.value(a, depth + 1) for a in node.args]
        kwargs = {str(k.arg): self.value(k.value, depth + 1) for k in node.keywords}
        return self.make(node.func.id, args, kwargs)

    def make(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self.names[name](*args, **kwargs)
        except (TypeError, ValueError) as error:
            made, message = self.names[name], str(error).replace(f"{name}.__init__()", name)
            if isinstance(made, type) and issubclass(made, Guidance) and message != str(error):  # arguments that do not fit
                message += f"; write {signature(made)}"
            raise ValueError(f"{self.what}: {_short(message, 2000)}") from None

    def source(self, node: ast.AST) -> str:
        """The piece of text a node stands for, shortened (``ast.unparse`` fails on deep nesting)."""
        return _short(ast.get_source_segment(self.text, node) or "", 60)

    def unknown(self, name: str) -> str:
        lowered = {known.lower(): known for known in self.names}
        same = [name.lower()] if name.lower() in lowered else []
        near = [lowered[m] for m in same or difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(sorted(self.names))}"
        return f"{self.what}: unknown name {_short(name)!r}; {hint}"
