"""Guidance cards: a method of the registry with one typed control for each of its fields, or the expression as text."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal

from genkit.guidance import Guidance, NoGuidance, parse, registry
from genkit.guidance.base import arguments
from genkit.guidance.scheduled import SHAPES
from genkit_apps.models import Kind

NONE = "none"
#: Choices of fields that are annotated as plain strings.
CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("Scheduled", "shape"): tuple(SHAPES),
    ("Autoguidance", "condition"): ("cond", "uncond"),
}

_TOKENS = (
    NONE,
    "CFG(3.0)",
    "Interval(CFG(3.0), 0.0, 0.5, unit='fraction')",
    "CFG(8.0)",
    "Adaptive(CFG(3.0), threshold=0.995)",
    "Scheduled(CFG(3.0), shape='lambda')",
)
#: What the cards begin with, for each kind of model; those of tokens have no noise levels.
FIRST: Mapping[Kind, tuple[str, ...]] = {
    "diffusion": (
        NONE,
        "CFG(3.0)",
        "Interval(APG(8.0), 0.28, 5.42)",
        "CFG(8.0)",
        "Adaptive(CFG(3.0), threshold=0.995, measure='x0')",
        "Scheduled(CFG(3.0), shape='lambda')",
    ),
    "next-token": _TOKENS,
    "next-scale": _TOKENS,
}

ControlKind = Literal["number", "whole", "check", "choice", "name", "guidance", "text"]


@dataclass(frozen=True)
class Control:
    """What one field of a method is edited with.

    Attributes:
        name: of the field.
        kind: ``"number"``, ``"whole"`` (a number), ``"check"`` (a box), ``"choice"`` (of ``choices``), ``"name"`` (a
            string), ``"guidance"`` (an expression) or ``"text"`` (anything else, as in an expression: ``(10.0, 5.0)``).
        info: the field's line in the documentation of its class.
    """

    name: str
    kind: ControlKind
    info: str = ""
    choices: tuple[str, ...] = ()


def methods() -> list[str]:
    """What a card can choose from: "none", then the methods by name."""
    return [NONE, *sorted(name for name in registry() if name != NoGuidance.__name__)]


def fitting(text: str, kind: Kind) -> str:
    """``text``; but if cards of another kind of model begin with it, what those of this kind begin with in its place."""
    return next((FIRST[kind][row.index(text)] for row in FIRST.values() if text in row), text)


def about(method: str) -> str:
    """The first line of a method's documentation."""
    return "" if method == NONE else _paragraph(registry()[method].__doc__ or "")


def example(method: str) -> str:
    """A typical expression of a method."""
    if method == NONE:
        return NONE
    examples = registry()[method].examples
    return expression(parse(examples[0])) if examples else f"{method}()"


@cache
def controls(method: str) -> tuple[Control, ...]:
    """The controls of a method's fields, in the order of a call."""
    if method == NONE:
        return ()
    cls = registry()[method]
    hints, lines = typing.get_type_hints(cls), _lines(cls.__doc__ or "")
    return tuple(_control(method, f.name, hints[f.name], lines.get(f.name, "")) for f in arguments(cls))


def method_of(guidance: Guidance) -> str:
    """The entry of :func:`methods` that a guidance belongs to."""
    return NONE if type(guidance) is NoGuidance else type(guidance).__name__


def values(guidance: Guidance) -> dict[str, Any]:
    """What the controls show for a guidance: numbers, truth values and texts."""
    return {c.name: _shown(c, getattr(guidance, c.name)) for c in controls(method_of(guidance))}


def assemble(method: str, entered: Mapping[str, Any]) -> str:
    """The expression of what stands in the controls; not checked, so that a wrong entry can be shown where it is made."""
    if method == NONE:
        return NONE
    return f"{method}({', '.join(f'{c.name}={_literal(c, entered[c.name])}' for c in controls(method) if c.name in entered)})"


def expression(guidance: Guidance) -> str:
    """The shortest expression that makes this guidance: arguments without a default by place, others where they differ."""
    if type(guidance) is NoGuidance:
        return NONE
    parts = []
    for f in arguments(type(guidance)):
        value = getattr(guidance, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is MISSING and not f.kw_only:
            parts.append(_written(value))
        elif default is MISSING or value != default:
            parts.append(f"{f.name}={_written(value)}")
    return f"{type(guidance).__name__}({', '.join(parts)})"


def _written(value: Any) -> str:
    if isinstance(value, Guidance):
        return "NoGuidance()" if type(value) is NoGuidance else expression(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _control(method: str, name: str, hint: Any, info: str) -> Control:
    if (method, name) in CHOICES:
        return Control(name, "choice", info, CHOICES[method, name])
    if typing.get_origin(hint) is Literal:
        return Control(name, "choice", info, tuple(map(str, typing.get_args(hint))))
    if isinstance(hint, type) and issubclass(hint, Guidance):
        return Control(name, "guidance", info)
    kinds: dict[Any, ControlKind] = {float: "number", int: "whole", bool: "check", str: "name"}
    return Control(name, kinds.get(hint, "text"), info)


def _shown(control: Control, value: Any) -> Any:
    if control.kind == "number" and not math.isfinite(value):
        return None  # the empty field; see _literal
    return _written(value) if control.kind in ("guidance", "text") else value


def _literal(control: Control, entered: Any) -> str:
    if control.kind in ("choice", "name"):
        return repr(str(entered))
    if entered is None:
        return "inf" if control.kind == "number" else "None"
    if control.kind == "whole" and isinstance(entered, float) and entered.is_integer():
        return repr(int(entered))
    if control.kind == "guidance":
        return "NoGuidance()" if str(entered).strip().lower() in (NONE, "") else str(entered).strip()
    return str(entered).strip() if control.kind == "text" else repr(entered)


def _paragraph(doc: str) -> str:
    return " ".join(doc.strip().split("\n\n")[0].split()).replace("``", "`")


def _lines(doc: str) -> dict[str, str]:
    """The text of each argument in the "Args:" part of a docstring."""
    part = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", doc, re.DOTALL)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\s{8}\w[\w, ]*:)", "\n" + part[1]) if part else ():
        names, _, text = entry.strip().partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(text.split()).replace("``", "")
    return found


__all__ = [
    "FIRST",
    "NONE",
    "Control",
    "about",
    "assemble",
    "controls",
    "example",
    "expression",
    "fitting",
    "method_of",
    "methods",
    "values",
]
