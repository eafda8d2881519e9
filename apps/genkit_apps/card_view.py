"""A guidance card on the page: method, typed controls and expression, kept in step with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from genkit.guidance import parse
from genkit_apps import cards
from genkit_apps.limits import Limits, Refused
from genkit_apps.ui import AT_ONCE, REDRAW, guarded, problem, shown


class Card(NamedTuple):
    """The components of one card. ``expression`` is what counts; the others follow it, or write it."""

    panel: gr.Column
    method: gr.Dropdown
    expression: gr.Textbox
    shape: gr.State  # the expression whose controls are drawn; None where the card is hidden
    problem: gr.HTML
    remove: gr.Button

    @property
    def outputs(self) -> list[Any]:
        """What :func:`updates` sets."""
        return [self.panel, self.method, self.expression, self.shape, self.problem]


def updates(text: str | None, limits: Limits) -> list[Any]:
    """Updates of one card's outputs: an expression, right or wrong, or None to hide the card."""
    if text is None:
        return [gr.update(visible=False), gr.update(), "", None, shown("")]
    try:
        method, shape, wrong = cards.method_of(limits.guidance(text)), text, ""
    except Refused as refused:
        method, shape, wrong = cards.NONE, cards.NONE, refused.message
    return [gr.update(visible=True), method, text, shape, shown(wrong)]


def card(prefix: str, number: int, text: str | None, limits: Limits) -> Card:
    """Draw a card. Its ids begin with ``prefix`` and end with its number."""
    end = f"-{number}"
    with gr.Column(visible=text is not None, min_width=240, elem_id=f"{prefix}-card{end}", elem_classes="gk-card") as panel:
        with gr.Row(elem_classes="gk-card-head"):
            gr.HTML(f'<h2><span class="gk-number">{number}</span> Guidance</h2>', js_on_load=None)
            remove = gr.Button("Remove", size="sm", min_width=70, scale=0, elem_id=f"{prefix}-remove{end}")
        chosen = cards.method_of(parse(text)) if text else cards.NONE
        method = gr.Dropdown(
            cards.methods(), value=chosen, label=f"Method {number}", elem_id=f"{prefix}-method{end}", min_width=120
        )
        shape = gr.State(text)
        controls = gr.Column(elem_classes="gk-controls")
        expression = gr.Textbox(
            text or "",
            label=f"Expression {number}",
            lines=2,
            max_lines=4,
            elem_id=f"{prefix}-expression{end}",
            elem_classes="gk-mono",
        )
        wrong = problem(f"{prefix}-expression{end}-error")
    made = Card(panel, method, expression, shape, wrong, remove)
    with controls:
        _draw_controls(made, prefix, number, limits)
    _connect(made, prefix, number, limits)
    return made


def _connect(made: Card, prefix: str, number: int, limits: Limits) -> None:
    def choose(method: str, text: str, drawn: str) -> tuple[Any, ...]:
        if method == cards.method_of(parse(drawn)):  # the field was only left; that counts as input, too
            return gr.skip(), gr.skip(), gr.skip()
        chosen = start(method, text)
        return chosen, chosen, shown("")

    def read(text: str) -> tuple[Any, ...]:
        try:
            guidance = limits.guidance(text)
        except Refused as refused:
            return gr.update(), gr.update(), shown(refused.message)
        return cards.method_of(guidance), cards.expression(guidance), shown("")

    outputs = [made.expression, made.shape, made.problem]
    made.method.input(
        guarded(choose),
        [made.method, made.expression, made.shape],
        outputs,
        **REDRAW,
        api_name=f"{prefix}_method_{number}",
        **_QUIET,
    )
    for event, name in ((made.expression.blur, "blur"), (made.expression.submit, "submit")):
        event(
            guarded(read),
            [made.expression],
            [made.method, made.shape, made.problem],
            **REDRAW,
            api_name=f"{prefix}_expression_{name}_{number}",
            **_QUIET,
        )


_QUIET = {"api_visibility": "undocumented"}


def start(method: str, text: str) -> str:
    """The expression a card gets when its method is chosen: a typical one, around the guidance that was there if it fits."""
    typical = cards.example(method)
    wraps = [c.name for c in cards.controls(method) if c.kind == "guidance"]
    try:
        inside = parse(text)
        if wraps != ["inner"] or cards.method_of(inside) in (cards.NONE, method):
            return typical
        entered = {**cards.values(parse(typical)), "inner": cards.expression(inside)}
        return cards.expression(parse(cards.assemble(method, entered)))
    except ValueError:
        return typical


def _draw_controls(made: Card, prefix: str, number: int, limits: Limits) -> None:
    # One at a time: Gradio goes through a session's components while another drawing would add to them.
    # Hidden cards not before they are shown: a drawing at the page's load may come so late that it replaces what is in use.
    @gr.render(  # type: ignore[untyped-decorator]
        inputs=[made.shape],
        triggers=[made.shape.change] if made.shape.value is None else None,
        concurrency_id="draw",
        concurrency_limit=1,
        show_progress="hidden",
    )
    def draw(text: str | None) -> None:
        if text is None:
            return
        guidance = parse(text)
        method, entered = cards.method_of(guidance), cards.values(guidance)
        gr.Markdown(cards.about(method) or "The conditional prediction as it is.", elem_classes="gk-about")
        controls = cards.controls(method)
        with gr.Row(elem_classes="gk-fields"):
            fields = [_field(c, entered[c.name], f"{prefix}-{c.name}-{number}") for c in controls]
        if controls:
            with gr.Accordion("What the arguments mean", open=False, elem_classes="gk-help"):
                gr.Markdown("\n".join(f"- **{c.name}**: {c.info}" for c in controls))
        update = _writer(method, [c.name for c in controls], limits)
        for control in fields:
            control.input(
                update, fields, [made.expression, made.problem], **AT_ONCE, trigger_mode="always_last", api_visibility="private"
            )


def _writer(method: str, names: list[str], limits: Limits) -> Callable[..., Any]:
    def write(*entered: Any) -> tuple[str, Any]:
        text = cards.assemble(method, dict(zip(names, entered, strict=True)))
        try:
            return cards.expression(limits.guidance(text)), shown("")
        except Refused as refused:
            return text, shown(refused.message)

    return guarded(write)


def _field(control: cards.Control, value: Any, elem_id: str) -> Any:
    narrow = {"label": control.name, "elem_id": elem_id, "interactive": True, "min_width": 96}
    if control.kind in ("number", "whole"):
        step = 1 if control.kind == "whole" else 0.1
        return gr.Number(value, step=step, placeholder="inf" if value is None else None, **narrow)
    if control.kind == "check":
        return gr.Checkbox(bool(value), **{**narrow, "min_width": 160})
    if control.kind == "choice":
        return gr.Dropdown(list(control.choices), value=value, **narrow)
    return gr.Textbox(str(value), lines=1, max_lines=3, elem_classes="gk-mono", **{**narrow, "min_width": 200})


__all__ = ["Card", "card", "start", "updates"]
