"""Work in a thread: events in order, stopped at the next step, the worker freed."""

import threading
import time

import gradio as gr
import pytest
from genkit_apps import jobs
from genkit_apps.jobs import Cancelled, Event, Job, stream
from genkit_apps.limits import Refused
from genkit_apps.ui import guarded


def test_the_result_comes_last_and_done_events_are_never_dropped():
    def work(job: Job) -> str:
        for k in range(20):
            job.emit(Event("progress", k, 20))
            if k % 5 == 0:
                job.emit(Event("done", k, 20))
        return "result"

    *events, last = stream(work)
    assert last == "result"
    assert [e.step for e in events if e.kind == "done"] == [0, 5, 10, 15]


def test_news_nobody_looked_at_are_replaced_but_progress_does_not_push_out_a_preview():
    job = jobs._Run(lambda job: None)
    for event in (Event("preview", 1), Event("preview", 2), Event("progress", 3), Event("progress", 4)):
        job.emit(event)
    job.ended = True
    assert [job.next(), job.next(), job.next()] == [Event("preview", 2), Event("progress", 4), None]


def steps(log: list[int], started: threading.Event):
    def work(job: Job) -> None:
        for k in range(1000):
            job.check()
            log.append(k)
            job.emit(Event("progress", k, 1000))
            started.set()
            time.sleep(0.01)

    return work


def test_cancel_by_key_stops_at_the_next_step_and_frees_the_worker():
    log, started, events = list[int](), threading.Event(), stream_in_thread("mine")
    events.start(log, started)
    assert started.wait(60)
    assert jobs.cancel("other") == 0
    assert jobs.cancel("mine", wait=60) == 1
    done = len(log)
    assert isinstance(events.error, Cancelled)
    time.sleep(0.1)
    assert len(log) <= done + 1 < 1000
    assert list(stream(lambda job: "next")) == ["next"]  # would wait for ever if the worker were not free
    assert not jobs._running


class stream_in_thread:
    """A consumer, as Gradio is one."""

    def __init__(self, key: str) -> None:
        self.key, self.error = key, None

    def start(self, log: list[int], started: threading.Event) -> None:
        def consume() -> None:
            try:
                for _ in stream(steps(log, started), self.key):
                    pass
            except BaseException as error:
                self.error = error

        threading.Thread(target=consume, daemon=True).start()


def test_closing_the_generator_cancels_without_waiting():
    log, started = list[int](), threading.Event()
    running = stream(steps(log, started), "left")
    next(running)
    before = time.monotonic()
    running.close()
    assert time.monotonic() - before < 5  # all of it would take 10
    assert list(stream(lambda job: 1)) == [1]
    assert len(log) < 1000


def test_one_job_at_a_time():
    busy, most = [0], [0]

    def work(job: Job) -> None:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        busy[0] -= 1

    threads = [threading.Thread(target=lambda: list(stream(work))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1]


def test_an_error_of_the_work_is_raised_where_the_events_are_read():
    def work(job: Job) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        list(stream(work))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused("seeds", "'one' is no seed"), "seeds: 'one' is no seed"),
        (Cancelled(), "Cancelled."),
        (KeyError("x"), "app's log"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_an_event_raises_is_told_without_its_inside(error, words, streams):
    def plain():
        raise error

    def several():
        yield 1
        raise error

    with pytest.raises(gr.Error, match=words) as told:
        list(guarded(several)()) if streams else guarded(plain)()
    assert "KeyError" not in str(told.value)
    assert not told.value.print_exception
