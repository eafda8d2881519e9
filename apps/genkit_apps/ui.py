"""What the tabs share: how a message, a progress bar and an unexpected error look, and how model work is queued."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from genkit_apps import jobs
from genkit_apps.jobs import Event
from genkit_apps.limits import Refused

log = logging.getLogger("genkit_apps")

#: Arguments of every event that runs a model: they share one worker. ``.click(..., **MODEL_WORK, api_name="...")``.
MODEL_WORK: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "show_progress": "hidden",
    "trigger_mode": "once",
}
#: Arguments of small events that only change the page: at once, beside the queue.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


#: The same for events that change a ``gr.State`` which draws a part of the page: only answers of the queue tell the page so.
REDRAW: dict[str, Any] = {"queue": True, "concurrency_limit": None, "show_progress": "hidden"}


def message(text: str) -> str:
    """A message at a field, as HTML for a ``gr.HTML(elem_classes="field-error")``; "" for none."""
    return f'<p class="gk-error" role="alert">{html.escape(text)}</p>' if text else ""


def problem(elem_id: str) -> gr.HTML:
    """The place of a field's message, empty and hidden; see :func:`shown`."""
    return gr.HTML("", visible=False, elem_id=elem_id, js_on_load=None)


def shown(text: str) -> Any:
    """The update of a :func:`problem` that shows a message, or hides it for ""."""
    return gr.update(value=message(text), visible=bool(text))


def api_note(text: str, code: str, elem_id: str) -> None:
    """The section of a tab that says how to call it from a program."""
    with gr.Accordion("Use it from Python (API)", open=False, elem_id=elem_id):
        gr.Markdown(text)
        gr.Code(code, language="python", interactive=False, label="With gradio_client", elem_id=f"{elem_id}-code")


def note(text: str) -> str:
    """A status line, as HTML."""
    return f'<p class="gk-note" role="status">{html.escape(text)}</p>' if text else ""


def progress(event: Event) -> str:
    """A progress bar with its text, as HTML."""
    text = html.escape(event.text or "working")
    share = 100 * event.step / event.total if event.total else 0.0
    return (
        f'<div class="gk-progress" role="progressbar" aria-label="{text}" aria-valuemin="0" aria-valuemax="{event.total}" '
        f'aria-valuenow="{event.step}"><div class="gk-bar" style="width:{share:.1f}%"></div>'
        f"<span>{text} · {event.step}/{event.total}</span></div>"
    )


def beside(controls: Callable[[], None], results: Callable[[], None]) -> None:
    """The layout of a tab of one image: its controls, and a wider column of what comes out."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls()
        with gr.Column(scale=5, min_width=320):
            results()


def work_key(tab: str, request: gr.Request) -> str:
    """Under which the job of a session's tab is found; "" for a caller without a session."""
    return f"{tab} {request.session_hash}" if request.session_hash else ""


def canceller(tab: str) -> Callable[[gr.Request], str]:
    """For a tab's Cancel: stops the session's run at its next step."""

    def cancel(request: gr.Request) -> str:
        """Stop the run of this session at its next step."""
        return note("Cancelling at the next step." if jobs.cancel(work_key(tab, request)) else "Nothing is running.")

    return cancel


def unexpected(error: BaseException) -> gr.Error:
    """Log an error that nobody foresaw under an id, and say that id and nothing else."""
    number = uuid.uuid4().hex[:8]
    log.error("unexpected error %s", number, exc_info=error)
    return gr.Error(f"Something went wrong here. The app's log has the details under {number}.", print_exception=False)


def guarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` (plain or a generator) for an event: Refused becomes a message that names its field, anything else a logged id."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, Refused):
            return gr.Error(f"{error.field}: {error.message}", print_exception=False)
        if isinstance(error, jobs.Cancelled):
            return gr.Error("Cancelled.", print_exception=False)
        return unexpected(error)

    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from fn(*args, **kwargs)
            except Exception as error:
                raise told(error) from None

        return stream

    @functools.wraps(fn)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise told(error) from None

    return plain


__all__ = [
    "AT_ONCE",
    "MODEL_WORK",
    "REDRAW",
    "api_note",
    "beside",
    "canceller",
    "guarded",
    "message",
    "note",
    "problem",
    "progress",
    "shown",
    "unexpected",
    "work_key",
]
