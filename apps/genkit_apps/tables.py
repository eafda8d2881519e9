"""A table that sorts by a click on a heading, also from the keyboard."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

_CSS = """
.gk-scroll { overflow-x: auto; max-height: 34rem; border: 1px solid var(--border-color-primary); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; color: var(--body-text-color); }
caption { text-align: left; padding: .4rem .6rem; font-size: .8rem; color: var(--body-text-color); }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--border-color-primary); }
th { position: sticky; top: 0; vertical-align: bottom; background: var(--background-fill-secondary); z-index: 1; }
th.gk-text, td.gk-text { text-align: left; }
td.gk-text { font-family: var(--font-mono); font-size: .8rem; }
th button { all: unset; cursor: pointer; font-weight: 600; font-size: .8rem; color: var(--body-text-color); }
th button:focus-visible { outline: 2px solid #d97706; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
small { display: block; font-weight: 400; font-size: .68rem; color: var(--body-text-color); opacity: .85; }
"""

_JS = """
let column = null, rising = true;
function sort() {
  const body = element.querySelector('tbody');
  if (!body || column === null || !body.rows.length || column >= body.rows[0].cells.length) return;
  const key = row => row.cells[column].dataset.sort;
  const number = row => key(row) === '' ? NaN : Number(key(row));
  const words = [...body.rows].some(row => key(row) !== '' && Number.isNaN(Number(key(row))));
  const order = (a, b) => {
    if ((key(a) === '') !== (key(b) === '')) return key(a) === '' ? 1 : -1;  // what is missing stands last either way
    const found = words ? key(a).localeCompare(key(b)) : (number(a) - number(b) || 0);
    return rising ? found : -found;
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
  element.querySelectorAll('th').forEach((head, i) => {
    if (i === column) head.setAttribute('aria-sort', rising ? 'ascending' : 'descending');
    else head.removeAttribute('aria-sort');
  });
}
element.addEventListener('click', event => {
  const button = event.target.closest('th button');
  if (!button) return;
  const index = button.closest('th').cellIndex;
  rising = column === index ? !rising : true;
  column = index;
  sort();
});
watch('value', sort);
"""


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: a number (4 digits are shown), a text, or None; ``below`` in small type."""

    value: float | str | None
    below: str = ""


@dataclass(frozen=True)
class Heading:
    """The heading of a column; ``below`` in small type; ``text`` for a column of texts."""

    title: str
    below: str = ""
    text: bool = False


def sortable(elem_id: str, **more: Any) -> gr.HTML:
    """The component; its value is made by :func:`table`."""
    look: dict[str, Any] = {"css_template": _CSS, "js_on_load": _JS, "apply_default_css": False, "padding": False}
    return gr.HTML("", elem_id=elem_id, **look, **more)


def table(caption: str, headings: Sequence[Heading], rows: Sequence[Sequence[Cell]]) -> str:
    """The table as HTML."""
    heads = "".join(f'<th scope="col"{_class(h)}><button>{html.escape(h.title)}</button>{_small(h.below)}</th>' for h in headings)
    body = "".join(
        "<tr>" + "".join(_cell(h, cell) for h, cell in zip(headings, row, strict=True)) + "</tr>" for row in rows
    )  # fmt: skip
    told = html.escape(caption)
    return (
        f'<div class="gk-scroll" tabindex="0" role="region" aria-label="{told}"><table><caption>{told}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(heading: Heading, cell: Cell) -> str:
    value = cell.value
    shown = "" if value is None else value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    key = "" if value is None else str(value)
    return f'<td{_class(heading)} data-sort="{html.escape(key)}">{html.escape(shown)}{_small(cell.below)}</td>'


def _class(heading: Heading) -> str:
    return ' class="gk-text"' if heading.text else ""


def _small(text: str) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


__all__ = ["Cell", "Heading", "sortable", "table"]
