"""Long work in a thread of its own: events while it goes on, cancelled at its next step."""

from __future__ import annotations

import contextvars
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from PIL.Image import Image

T = TypeVar("T")

#: Model work takes turns: one job at a time has the processor or the GPU, also while a cancelled one finishes its step.
_WORKER = threading.Lock()
_running: dict[str, set[Job]] = {}
_registry = threading.Lock()


class Cancelled(Exception):
    """The job was cancelled; what :meth:`Job.check` raises in the thread that does the work."""


@dataclass(frozen=True)
class Event:
    """What a job tells while it works.

    Attributes:
        kind: ``"progress"``, ``"preview"`` (with images) or ``"done"`` (a part of the work is finished, for example a column).
        step, total: of the whole job.
        images: one or several, None where there is none yet; empty for no news.
        text: for people.
    """

    kind: Literal["progress", "preview", "done"]
    step: int = 0
    total: int = 0
    images: tuple[Image | None, ...] = ()
    text: str = ""

    def place(self) -> dict[str, Any]:
        """How far the job is, for programs."""
        return {"step": self.step, "total": self.total, "text": self.text}


class Job:
    """The handle of a piece of work. The work calls ``check()`` and ``emit()`` at every step."""

    def __init__(self) -> None:
        self._stop, self._last = threading.Event(), 0.0
        self._news, self._changed = deque[Event](), threading.Condition()

    def cancel(self) -> None:
        """Ask the work to stop at its next step. From any thread, any number of times."""
        self._stop.set()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the job is to stop."""
        if self._stop.is_set():
            raise Cancelled

    def due(self, seconds: float = 0.25) -> bool:
        """Whether the last preview is long enough ago that another one is worth its price."""
        return time.monotonic() - self._last >= seconds

    def emit(self, event: Event) -> None:
        """Hand an event on. Progress and previews that nobody has looked at yet are replaced, "done" never is."""
        if event.kind == "preview":
            self._last = time.monotonic()
        with self._changed:
            if self._news and self._news[-1].kind != "done" and (event.kind != "progress" or self._news[-1].kind == "progress"):
                self._news.pop()
            self._news.append(event)
            self._changed.notify()


class _Run(Job, Generic[T]):
    """A job with its thread and its outcome."""

    def __init__(self, work: Callable[[Job], T]) -> None:
        super().__init__()
        self.work, self.ended = work, False
        self.value: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with _WORKER:
                self.check()
                self.value = self.work(self)
        except BaseException as error:  # handed to the consumer, where it is raised again
            self.error = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify()

    def next(self) -> Event | None:
        """The next event, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self.ended)
            return self._news.popleft() if self._news else None


def stream(work: Callable[[Job], T], key: str | None = None) -> Iterator[Event | T]:
    """Run ``work(job)`` in a thread; yield the events it emits, and last of all what it returns.

    Closing the generator (Gradio does so when the user leaves) cancels the job, without waiting for it.

    Args:
        work: checks ``job.check()`` at every step.
        key: under which :func:`cancel` finds the job, for example the session's; None: it is not to be found.

    Raises:
        Cancelled: the job was cancelled.
        Exception: whatever the work raises.
    """
    job = _Run(work)
    key = key or uuid.uuid4().hex  # without one nobody finds it
    with _registry:
        _running.setdefault(key, set()).add(job)
    threading.Thread(target=contextvars.copy_context().run, args=(job.run,), daemon=True, name="genkit-job").start()
    try:
        while (event := job.next()) is not None:
            yield event
        if job.error is not None:
            raise job.error
        yield job.value  # type: ignore[misc]  # the work has returned it
    finally:
        job.cancel()
        with _registry:
            _running[key].discard(job)
            if not _running[key]:
                del _running[key]


def cancel(key: str, wait: float = 0.0) -> int:
    """Cancel the jobs of one key, of a session for example. Returns how many there were.

    Args:
        wait: at most this many seconds, until those who read their streams have seen the end.
    """
    with _registry:
        jobs = list(_running.get(key, ()))
    for job in jobs:
        job.cancel()
    deadline = time.monotonic() + wait
    while jobs and time.monotonic() < deadline and any(job in _running.get(key, ()) for job in jobs):
        time.sleep(0.02)
    return len(jobs)


__all__ = ["Cancelled", "Event", "Job", "cancel", "stream"]
