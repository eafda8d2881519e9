"""What all pipelines make of their arguments: conditions and seeds in pairs, batches, a guidance."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from genkit.guidance import CFG, Guidance, NoGuidance, parse
from genkit.guidance.base import is_number
from genkit.random import check_seeds

T = TypeVar("T")


def paired(
    given: Any, seeds: Any, check: Callable[[Any], T], name: str = "classes", noun: str = "class"
) -> tuple[list[T], list[int]]:
    """Conditions and seeds, one of each per image: a single one (not a list) goes with all of the other.

    Args:
        check: what a condition is turned into; raises for one that there is not.
        name, noun: of the argument and of one of its values, for errors.

    Raises:
        ValueError: there are none, or more of one than of the other.
    """
    wanted, one = values(given)
    found = [check(value) for value in wanted]
    if not found:
        raise ValueError(f"{name} is empty: give at least one {noun}")
    some, one_seed = (range(len(found)), False) if seeds is None else values(seeds)
    numbers = check_seeds(some)
    if one:
        found = found * len(numbers)
    elif one_seed:
        numbers = numbers * len(found)
    if len(found) != len(numbers):
        raise ValueError(f"seeds has {len(numbers)} entries but {name} has {len(found)}: give one seed per {noun}")
    return found, numbers


def values(given: Any) -> tuple[list[Any], bool]:
    """One value or many (list, range, tensor, array) as a list of plain Python values, and whether it was one."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    one = isinstance(plain, str) or not isinstance(plain, Sequence)
    return [v.item() if hasattr(v, "item") else v for v in ([plain] if one else plain)], one


def class_index(value: int | str, count: int, names: tuple[str, ...], model: str) -> int:
    """Index of a class given by index or name. Raises ValueError naming what would work."""
    indices = f"an index from 0 to {count - 1}"
    if isinstance(value, str) and names:
        if value in names:
            return names.index(value)
        near = difflib.get_close_matches(value.lower(), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
        raise ValueError(f"classes contains {value!r}, which {model} does not know; {hint}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        also = f" or a name ({', '.join(names)})" if names else ""
        raise ValueError(f"classes contains {value!r}: use {indices}{also}")
    return value


def batches(count: int, size: int | None) -> list[slice]:
    """``count`` images, at most ``size`` at a time. Raises ValueError unless the size is positive or None."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"batch_size={size!r}: use a positive integer, or None for all images at once")
    return [slice(i, i + (size or count)) for i in range(0, count, size or count)]


def as_guidance(value: Guidance | str | float | None) -> Guidance:
    """A guidance from an object, an expression, a number (CFG of that scale) or None. Raises ValueError for anything else."""
    if value is None:
        return NoGuidance()
    if isinstance(value, Guidance):
        return value
    if isinstance(value, str):
        return parse(value)
    if is_number(value):
        return CFG(float(value))
    raise ValueError(f"guidance={value!r} must be a guidance object, an expression such as 'CFG(3.0)', a number, or None")
