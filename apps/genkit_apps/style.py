"""Theme and style sheet: fonts of the system, nothing from other hosts, readable in light and dark."""

from __future__ import annotations

from importlib.resources import files

import gradio as gr

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

THEME = gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO).set(
    # Gradio's own are below the contrast that WCAG asks for.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_hover_dark="*primary_700",
)
CSS = files("genkit_apps").joinpath("style.css").read_text("utf-8")
HEAD = '<meta name="color-scheme" content="light dark">'

__all__ = ["CSS", "HEAD", "THEME"]
