"""Guidance templates such as ``Interval(CFG({w}), {lo}, {hi})``, and grids of named values to put in."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from genkit.guidance import parse
from genkit_eval.errors import InputError

PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
MOST = 10_000  # combinations; more is a mistyped step


def names_of(template: str) -> tuple[str, ...]:
    """The names in braces, in order of appearance."""
    return tuple(dict.fromkeys(PLACE.findall(template)))


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with each ``{name}`` replaced, and single spaces."""
    return " ".join(PLACE.sub(lambda place: values[place.group(1)], template).split())


def check_names(templates: Sequence[str], given: Sequence[str], option: str) -> None:
    """InputError for a name of a template without values, and for values that no template has a place for."""
    used = [name for template in templates for name in names_of(template)]
    for name in used:
        if name not in given:
            raise InputError(option, f"no values for {{{name}}} of --guidance; give {option} {name}=...")
    for name in given:
        if name not in used:
            raise InputError(option, f"{name}: no --guidance has a place {{{name}}}")


def split(text: str, option: str) -> tuple[str, str]:
    """``name=rest`` as (name, rest); InputError for anything else."""
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier() or not rest:
        raise InputError(option, f"got {text!r}; name=values works, for example {option} w=1:4" + ":0.5" * (option == "--grid"))
    return name, rest


def values_of(text: str, option: str) -> list[str]:
    """``1:4:0.5`` (both ends, in exact decimals) or ``0.1,0.28,none`` (taken as they stand) as texts, each once."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) == 1:
        listed = [part.strip() for part in text.split(",")]
        if not all(listed):
            raise InputError(option, f"got {text!r}; values with commas between work")
        return list(dict.fromkeys(listed))
    try:
        start, stop, step = (Decimal(part) for part in parts)
        count = int((stop - start) / step) + 1
    except (ValueError, ArithmeticError):
        raise InputError(option, f"got {text!r}; start:stop:step, or values with commas between, work") from None
    if count < 1 or count > MOST:
        raise InputError(option, f"{text!r} is {max(count, 0)} values; start:stop:step of 1 to {MOST} works")
    return [format((start + i * step).normalize(), "f") for i in range(count)]


@dataclass(frozen=True)
class Expansion:
    """What templates came to: (text, guidance) pairs, how many were merged, and why others were left out (text, reason)."""

    guidances: tuple[tuple[str, Any], ...]
    merged: int
    refused: tuple[tuple[str, str], ...]

    def summary(self) -> str:
        """One line: how many there are, how many were left out and merged."""
        parts = [f"{len(self.guidances)} guidances"]
        if self.refused:
            parts.append(f"{len(self.refused)} combinations left out, such as {self.refused[0][0]} ({self.refused[0][1]})")
        if self.merged:
            parts.append(f"{self.merged} merged with an equal one")
        return "; ".join(parts)


def expand(templates: Sequence[str], grids: Sequence[str], option: str = "--grid") -> Expansion:
    """Every combination of ``grids`` in every template, in order; a template varies over its own names alone.

    Combinations that a guidance refuses (an interval upside down) are left out, equal ones are merged (``CFG(3)``, ``CFG(3.0)``).
    Raises InputError for a template that every combination of is refused, as a misspelt one is, and for names that do not fit.
    """
    values: dict[str, list[str]] = {}
    for text in grids:
        name, rest = split(text, option)
        if name in values:
            raise InputError(option, f"{name} is given twice")
        values[name] = values_of(rest, f"{option} {name}")
    check_names(templates, list(values), option)
    kept: dict[Any, str] = {}
    refused: dict[str, str] = {}
    merged = 0
    for template in templates:
        texts = combinations(template, values)
        accepted, reasons = parse_each(texts)
        if not accepted:
            raise InputError("--guidance", next(iter(reasons.values())))
        refused |= reasons
        for text, guidance in accepted:
            merged += guidance in kept
            kept.setdefault(guidance, text)
    return Expansion(tuple((text, guidance) for guidance, text in kept.items()), merged, tuple(refused.items()))


def combinations(template: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts of one template; the last name varies fastest."""
    names = names_of(template)
    count = 1
    for name in names:
        count *= len(values[name])
    if count > MOST:
        raise InputError("--grid", f"{template} has {count:,} combinations; at most {MOST:,} work")
    return [fill(template, dict(zip(names, row, strict=True))) for row in itertools.product(*(values[name] for name in names))]


def parse_each(texts: Sequence[str]) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """(text, guidance) pairs, and the reasons of those that were refused."""
    accepted, reasons = [], {}
    for text in texts:
        try:
            accepted.append((text, parse(text)))
        except ValueError as error:
            reasons[text] = str(error).removeprefix("guidance: ")
    return accepted, reasons
