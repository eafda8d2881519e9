"""What was wrong or unusual about images: counted, named, and refused above a threshold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from genkit_eval.errors import InputError

#: What is done with images of these kinds. It is what the published evaluators do, and seldom what one expects.
NOTES = {
    "16-bit grey": "values above 255 become white, as PIL and with it the published evaluators have it",
    "alpha": "the alpha channel is dropped",
    "CMYK": "converted to RGB without a colour profile",
    "EXIF rotation": "not applied, as in the published evaluators",
}
SHOWN = 5


@dataclass
class Problems:
    """Files that could not be read, as (name, reason); of each kind in ``NOTES`` the number of images and the first name."""

    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, kind: str, name: str) -> None:
        """Count an image of ``kind``."""
        count, first = self.notes.get(kind, (0, name))
        self.notes[kind] = (count + 1, first)

    def add(self, other: Problems) -> None:
        """Take in what was found in other images, which come after these."""
        self.errors += other.errors
        for kind, (count, name) in other.notes.items():
            known, first = self.notes.get(kind, (0, name))
            self.notes[kind] = (known + count, first)

    def check(self, most: int, option: str) -> None:
        """InputError when more than ``most`` files could not be read; it names the first ones."""
        if len(self.errors) > most:
            raise InputError(
                option,
                f"{self.named()}. Repair or remove what is damaged, or leave such files out with --max-errors {len(self.errors)} "
                "or more",
            )

    def named(self) -> str:
        """For example ``1 file cannot be read: a.png (image file is truncated)``."""
        shown = "; ".join(f"{name} ({reason})" for name, reason in self.errors[:SHOWN])
        more = f"; and {len(self.errors) - SHOWN} more" if len(self.errors) > SHOWN else ""
        return f"{len(self.errors)} {'file' if len(self.errors) == 1 else 'files'} cannot be read: {shown}{more}"

    def lines(self) -> list[str]:
        """What a reader of the numbers must know, one sentence each."""
        found = [f"{self.named()}; left out"] if self.errors else []
        for kind, (count, first) in sorted(self.notes.items()):
            found.append(f"{count} {'image' if count == 1 else 'images'} with {kind} (first {first}): {NOTES[kind]}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"errors": [list(error) for error in self.errors], "notes": {k: list(v) for k, v in self.notes.items()}}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Problems:
        """The reverse of ``as_dict``."""
        notes = {kind: (int(count), str(name)) for kind, (count, name) in found["notes"].items()}
        return cls([(str(name), str(reason)) for name, reason in found["errors"]], notes)
