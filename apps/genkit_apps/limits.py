"""What a request may ask for. Every refusal names the field at which the page shows its message."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from genkit.guidance import Guidance, parse
from genkit.samplers.diffusion import SAMPLERS, Sampler, find_sampler

MAX_SEED = 2**63 - 1


class Refused(ValueError):
    """Input that does not work: ``field`` says where, the message what would work."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field, message


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    Attributes:
        images: a column.
        columns: guidances beside each other.
        steps: of a sampler.
        expression: characters of a guidance or sampler.
        prompt: characters of a prompt.
        count: the largest whole number in a guidance or sampler (draws, iterations, rounds, ...).
        size: the largest other number in a guidance, apart from infinity.
        seconds: after which a job is stopped at its next step.
    """

    images: int = 16
    columns: int = 6
    steps: int = 200
    expression: int = 2000
    prompt: int = 1000
    count: int = 100
    size: float = 1e9
    seconds: float = 600.0

    def guidance(self, text: str, field: str = "guidance") -> Guidance:
        """The guidance a text describes. It is parsed, never run. Raises Refused."""
        found = self._text(text, field)
        try:
            made = parse(found)
        except ValueError as error:
            raise Refused(field, _plain(error, "guidance")) from None
        self._counts(made, field)
        return made

    def sampler(self, text: str, field: str = "sampler") -> Sampler:
        """The sampler a name or expression describes. Raises Refused."""
        try:
            made = find_sampler(self._text(text, field))
        except ValueError as error:
            raise Refused(field, _plain(error, "sampler")) from None
        for name, value in made.options.items():
            if type(SAMPLERS[made.name].options[name]) is int and value > self.count:  # an int by default is a count
                raise Refused(field, f"{made.name}: {name}={value} is more than the {self.count} allowed here")
        return made

    def seeds(self, text: Any, field: str = "seeds") -> list[int]:
        """Seeds from ``"0, 1, 5-8"`` (or a list of integers). Raises Refused."""
        parts = [str(v) for v in text] if isinstance(text, Sequence) and not isinstance(text, str) else split(str(text))
        found: list[int] = []
        for part in parts:
            match = re.fullmatch(r"(\d{1,19})(?:\s*-\s*(\d{1,19}))?", part.strip())
            if match is None:
                raise Refused(field, f"{part[:40]!r} is no seed; write whole numbers from 0, such as 0, 1, 5-8")
            first, last = int(match[1]), int(match[2] or match[1])
            if max(first, last) > MAX_SEED or last < first:
                raise Refused(field, f"{part[:50]!r}: seeds go from 0 to {MAX_SEED}, ranges upwards")
            if len(found) + last - first + 1 > self.images:
                raise Refused(field, f"more than {self.images} images in a column; give at most {self.images} seeds")
            found.extend(range(first, last + 1))
        if not found:
            raise Refused(field, "there is no seed; write for example 0-3")
        return found

    def number(self, value: Any, field: str, low: int, high: int) -> int:
        """A whole number in a range. Raises Refused."""
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or value % 1
            or not low <= value <= high
        ):
            raise Refused(field, f"{str(value)[:40]} must be a whole number from {low} to {high}")
        return int(value)

    def step_count(self, value: Any, field: str = "steps") -> int:
        """The steps of a sampler. Raises Refused."""
        return self.number(value, field, 1, self.steps)

    def prompts(self, text: str, field: str = "prompt") -> str:
        """A prompt. Raises Refused."""
        if not isinstance(text, str) or not text.strip():
            raise Refused(field, "the prompt is empty; write what the image is to show")
        if len(text) > self.prompt:
            raise Refused(field, f"the prompt has {len(text)} characters; at most {self.prompt} are taken")
        return text.encode(errors="replace").decode().strip()  # halves of characters, which JSON can hold

    def _text(self, text: Any, field: str) -> str:
        if not isinstance(text, str):
            raise Refused(field, f"{type(text).__name__} is no text; write an expression such as CFG(3.0)")
        if len(text) > self.expression:
            raise Refused(field, f"the expression has {len(text)} characters; at most {self.expression} are read")
        return text.strip()

    def _counts(self, guidance: Guidance, field: str) -> None:
        for f in fields(guidance):
            value = getattr(guidance, f.name)
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > self.count:
                name = type(guidance).__name__
                raise Refused(field, f"{name}: {f.name}={value} is more than the {self.count} allowed here")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and self.size < abs(number) < math.inf:
                    name = type(guidance).__name__
                    raise Refused(field, f"{name}: {f.name}={value} is beyond the {self.size:g} allowed here")
        for part in guidance.parts:
            self._counts(part, field)


def split(text: str) -> list[str]:
    """The parts of a list that people write: separated by commas, semicolons or line ends."""
    return [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]


def _plain(error: ValueError, argument: str) -> str:
    """The message without the name of the argument: the field says that already."""
    text = str(error)
    return text.removeprefix(f"{argument}: ").removeprefix(f"{argument}=")


__all__ = ["MAX_SEED", "Limits", "Refused", "split"]
