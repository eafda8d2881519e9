"""Messages at the fields of a tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from genkit_apps.limits import Refused
from genkit_apps.ui import problem, shown


class Fields:
    """The places for messages in a tab, by the name of the field, hidden while there is none.

    Args:
        tab: what element ids begin with.
    """

    def __init__(self, tab: str) -> None:
        self.tab, self.slots = tab, dict[str, gr.HTML]()

    def slot(self, name: str) -> None:
        """Put the place for messages about ``name`` here."""
        self.slots[name] = problem(f"{self.tab}-{name}-error")

    @property
    def outputs(self) -> list[gr.HTML]:
        """The components, for ``outputs=``."""
        return list(self.slots.values())

    def told(self, error: Refused | None = None) -> list[Any]:
        """Updates of all places: the message at its field (a field without one: at the first), none at the others."""
        where = None if error is None else error.field if error.field in self.slots else next(iter(self.slots))
        return [shown(error.message if error is not None and name == where else "") for name in self.slots]


__all__ = ["Fields"]
