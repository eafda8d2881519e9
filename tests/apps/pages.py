"""A page of the app on its own, called as programs do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from genkit_apps import app
from genkit_apps.models import Models
from gradio_client import Client


@contextmanager
def served(tab: str, models: Models, runs: Path | None = None) -> Iterator[Client]:
    """A client of an app with one tab."""
    with pytest.MonkeyPatch.context() as page:
        page.setattr(app, "TABS", (tab,))
        built = app.build(models, runs=runs)
    try:
        _, url, _ = app.serve(built, server_port=0, prevent_thread_lock=True)
        yield Client(url, verbose=False)
    finally:
        built.close()


def errors(values: Iterable[Any]) -> list[str]:
    """Messages at fields, of what an event returns."""
    shown = [str(v["value"]) for v in values if isinstance(v, dict) and v.get("value")]
    return [re.sub("<[^>]*>", "", text) for text in shown if "gk-error" in text]
