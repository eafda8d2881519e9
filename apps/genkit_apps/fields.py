"""Messages at the fields of a tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from genkit_apps.limits import Limits, Refused
from genkit_apps.models import Model
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

    def subject(self, names: Sequence[str], model: Model, limits: Limits) -> tuple[Any, Any, Any, Any]:
        """Draw what one image is asked for by: model, class, prompt and seed, each with the place for its messages."""
        chosen = gr.Dropdown(list(names), value=model.name, label="Model", elem_id=f"{self.tab}-model")
        self.slot("model")
        label = gr.Dropdown(label="Class", elem_id=f"{self.tab}-class", allow_custom_value=True, **model.choice())
        self.slot("classes")
        text = model.num_classes is None
        prompt = gr.Textbox("", label="Prompt", elem_id=f"{self.tab}-prompt", max_length=limits.prompt, visible=text)
        self.slot("prompt")
        seed = gr.Textbox("0", label="Seed", elem_id=f"{self.tab}-seed", max_length=20)
        self.slot("seeds")
        return chosen, label, prompt, seed

    @property
    def outputs(self) -> list[gr.HTML]:
        """The components, for ``outputs=``."""
        return list(self.slots.values())

    def told(self, error: Refused | None = None) -> list[Any]:
        """Updates of all places: the message at its field (a field without one: at the first), none at the others."""
        where = None if error is None else error.field if error.field in self.slots else next(iter(self.slots))
        return [shown(error.message if error is not None and name == where else "") for name in self.slots]


__all__ = ["Fields"]
