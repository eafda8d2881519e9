"""The report: one self-contained HTML file."""

from __future__ import annotations

from importlib.util import find_spec

from genkit_eval.errors import InputError

NEEDED = ("matplotlib", "jinja2")


def check_installed() -> None:
    """InputError when a package that the report is made with is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError("report", f"{' and '.join(missing)} not installed; pip install 'genkit-image[eval]' brings all it needs")
