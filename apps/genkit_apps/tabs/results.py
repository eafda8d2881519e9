"""The tab that opens runs of ``genkit-eval``, finished or going on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gradio as gr
from PIL.Image import Image

from genkit_apps import plots
from genkit_apps.app import Context
from genkit_apps.fields import Fields
from genkit_apps.limits import Refused
from genkit_apps.results_reader import Entry, Folder, Metric, Run, Unreadable, picture
from genkit_apps.tables import Cell, Heading, sortable, table
from genkit_apps.ui import AT_ONCE, api_note, guarded, note

TITLE = "Results"
ABOUT = "Runs of `genkit-eval` (`run`, `sweep`, `tune`, `score`) below the folder given by `--runs`. A click on a heading sorts."
EVERY = 3.0  # seconds between two looks at a run
GRIDS = 24  # pictures shown of a run
COSTS = {"nfe": "NFE", "seconds": "s/image"}
ARROWS = {"lower": " ↓", "higher": " ↑"}
API = """
`/results` reads a run: its status, and of each guidance the numbers with their protocols and intervals, and whether it is on the
Pareto front. `/results_runs` lists the runs there are. `/results_open` and `/results_plot` are what the page shows, as HTML.
"""
CODE = """from gradio_client import Client

client = Client("http://127.0.0.1:7860")
run = client.predict("quickstart", api_name="/results")
print(run["status"], [(entry["label"], entry["nfe"], entry["metrics"]["frechet"]) for entry in run["guidances"]])
"""


def build(app: Context) -> None:
    """Draw the tab."""
    gr.Markdown(ABOUT)
    if app.runs is None:
        gr.Markdown("No folder of runs was given: start the app with `genkit-demo --runs FOLDER`.", elem_id="results-none")
        return
    tab = _Tab(app, Folder(app.runs))
    tab.draw()
    tab.events()
    gr.api(guarded(tab.plain), api_name="results", queue=False)
    gr.api(guarded(tab.folder_names), api_name="results_runs", queue=False)
    api_note(API, CODE, "results-api")


class _Tab:
    def __init__(self, app: Context, folder: Folder) -> None:
        self.app, self.folder, self.fields = app, folder, Fields("results")

    def draw(self) -> None:
        names = self.folder.names()
        self.name = gr.Dropdown(
            names, value=names[0] if names else None, label="Run folder", allow_custom_value=True, elem_id="results-folder",
            info="below the folder of runs",
        )  # fmt: skip
        self.fields.slot("folder")
        with gr.Row():
            self.open = gr.Button("Open", variant="primary", elem_id="results-open", min_width=100)
            self.refresh = gr.Button("Look for runs", elem_id="results-refresh", min_width=100)
            self.watch = gr.Checkbox(False, label="Watch a run that goes on", elem_id="results-watch", min_width=200)
        self.status = gr.HTML(note("Choose a run and open it."), elem_id="results-status")
        self.table = sortable("results-table")
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Row(visible=False, elem_id="results-axes") as self.axes:
                    self.across = gr.Dropdown([], label="Across", elem_id="results-across", min_width=130)
                    self.up = gr.Dropdown([], label="Up", elem_id="results-up", min_width=130)
                self.fields.slot("axes")
                self.plot = gr.HTML(elem_id="results-plot")
            with gr.Column(min_width=300, visible=False) as self.side:
                self.grids = gr.Gallery(
                    label="Images of each guidance", elem_id="results-grids", columns=2, height=620,
                    interactive=False, buttons=["download", "fullscreen"], object_fit="contain", format="png",
                )  # fmt: skip
        self.seen = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)

    def events(self) -> None:
        plotted = [self.across, self.up]
        shown = [self.status, self.table, self.plot, self.grids, self.side, self.axes, *plotted, self.seen, *self.fields.outputs]
        self.open.click(guarded(self.read), self.name, shown, api_name="results_open", **AT_ONCE)
        self.name.input(guarded(self.read), self.name, shown, api_name="results_choose", api_visibility="undocumented", **AT_ONCE)
        self.refresh.click(guarded(self.runs), None, self.name, api_name="results_look", api_visibility="undocumented", **AT_ONCE)
        self.watch.change(
            lambda on: gr.Timer(active=bool(on)),
            self.watch,
            self.timer,
            api_name="results_watch",
            api_visibility="undocumented",
            **AT_ONCE,
        )
        self.timer.tick(
            guarded(self.again),
            [self.name, self.seen, self.across, self.up],
            shown,
            api_name="results_tick",
            api_visibility="undocumented",
            **AT_ONCE,
        )
        for axis, name in ((self.across, "results_plot"), (self.up, "results_plot_up")):
            axis.input(
                guarded(self.redraw),
                [self.name, self.across, self.up],
                [self.plot, *self.fields.outputs],
                api_name=name,
                **AT_ONCE,
            )

    def runs(self) -> Any:
        """The runs below the folder, the newest first."""
        return gr.update(choices=self.folder.names())

    def folder_names(self) -> list[str]:
        """The runs below the folder, the newest first."""
        return self.folder.names()

    def plain(self, run: str) -> dict[str, Any]:
        """The numbers of a run.

        Parameters:
            run: one of those that results_runs lists.
        """
        try:
            found = self.folder.read(run)
        except Unreadable as error:
            raise Refused("run", str(error)) from None
        entries = []
        for entry, best in zip(found.entries, _front(found), strict=True):
            metrics = {name: asdict(metric) for name, metric in entry.metrics.items()}
            cost = {"n": entry.n, "nfe": entry.nfe, "seconds": entry.seconds}
            entries.append({"label": entry.label, **cost, "front": best, "metrics": metrics})
        about = {"status": found.status, "about": found.about, "warnings": list(found.warnings), "blocks": found.blocks}
        return {**about, "guidances": entries}

    def read(self, name: str, across: str | None = None, up: str | None = None) -> list[Any]:
        """Open a run: status, table, plot, grids with their captions, and what is needed to watch it."""
        try:
            stamp, run = self.folder.stamp(name), self.folder.read(name)
        except Unreadable as error:
            return [*_nothing(), None, *self.fields.told(Refused("folder", str(error)))]
        if not run.entries:
            return [_status(run), *_nothing()[1:], (name, stamp), *self.fields.told()]
        axes = _axes(run)
        across, up = across if across in axes.values() else None, up if up in axes.values() else None
        across, up = across or _first(run, "nfe", "recall"), up or _first(run, "frechet", *run.metrics)
        plot = _plot(run, across, up) if across and up else note("There is nothing to plot.")
        chosen = [gr.update(choices=list(axes.items()), value=value) for value in (across, up)]
        pictures, problem = _grids(run)
        told = None if not problem else Refused("folder", problem)
        grids = [gr.update(value=pictures), gr.update(visible=bool(pictures))]
        state = (name, stamp)
        return [_status(run), _table(run), plot, *grids, gr.update(visible=True), *chosen, state, *self.fields.told(told)]

    def again(self, name: str, seen: Any, across: str | None, up: str | None) -> list[Any]:
        """Read the run anew if there is something new."""
        skipped = [gr.skip()] * (9 + len(self.fields.slots))
        try:
            stamp = self.folder.stamp(name)
            known = seen[1] if seen is not None and seen[0] == name else None
            if known is not None and known[:2] == stamp[:2]:  # no new numbers
                if known == stamp:
                    return skipped
                return [_status(self.folder.read(name)), *skipped[:7], (name, stamp), *skipped[9:]]
        except Unreadable as error:
            return [*_nothing(), None, *self.fields.told(Refused("folder", str(error)))]
        return self.read(name, across, up)

    def redraw(self, name: str, across: str, up: str) -> list[Any]:
        """The plot of two metrics or costs (``nfe``, ``seconds``) of a run."""
        try:
            run = self.folder.read(name)
        except Unreadable as error:
            return [gr.skip(), *self.fields.told(Refused("folder", str(error)))]
        for axis in (across, up):
            if axis not in _axes(run).values():
                known = ", ".join(_axes(run).values())
                return [
                    gr.skip(),
                    *self.fields.told(Refused("axes", f"{str(axis)[:40]!r} is not known here; use one of {known}")),
                ]
        return [_plot(run, across, up), *self.fields.told()]


def _nothing() -> list[Any]:
    """Status, table, plot, grids and axes of no run."""
    hidden = gr.update(visible=False)
    return [note(""), "", "", gr.update(value=None), hidden, hidden, gr.skip(), gr.skip()]


def _status(run: Run) -> str:
    if run.status == "begun":
        return note(f"{run.about}: the run has begun, no guidance is finished yet; {run.blocks} blocks of images so far.")
    count = len(run.entries)
    parts = [run.about, f"{count} guidance{'s' if count != 1 else ''}", f"status: {run.status}"]
    text = " · ".join(part for part in parts if part)
    if run.status == "partial":
        text += f" ({run.blocks} blocks of images so far)"
    return note(text) + "".join(note(warning) for warning in run.warnings)


def _heading(metric: Metric) -> str:
    return f"{metric.title}{ARROWS.get(metric.better, '')} ({metric.variant})"


def _usual(run: Run) -> tuple[str, ...]:
    """What guidances are weighed by, as far as every entry has it: Frechet distance, recall, network evaluations."""
    return tuple(name for name in ("frechet", "recall", "nfe") if all(entry.value(name) is not None for entry in run.entries))


def _front(run: Run) -> list[bool]:
    return run.front(_usual(run)) if _usual(run) else [False] * len(run.entries)


def _table(run: Run) -> str:
    """A column for each metric, with its protocol below the heading and its interval below the number."""
    known = [run.metric(name) for name in run.metrics]
    heads = [Heading("#"), Heading("guidance", text=True), Heading("front", text=True), Heading("n"), Heading("NFE ↓")]
    heads += [Heading("s/image ↓"), *(Heading(m.title + ARROWS.get(m.better, ""), m.variant) for m in known)]
    rows = []
    for number, (entry, best) in enumerate(zip(run.entries, _front(run), strict=True), 1):
        row = [Cell(number), Cell(entry.label), Cell("★" if best else ""), Cell(entry.n), Cell(entry.nfe), Cell(entry.seconds)]
        rows.append([*row, *(_cell(entry.metrics.get(name)) for name in run.metrics)])
    best_of = f"★: on the Pareto front of {', '.join(_title(run, name) for name in _usual(run))}; " if _usual(run) else ""
    return table(f"Guidances; {best_of}small: 95 % interval", heads, rows)


def _cell(metric: Metric | None) -> Cell:
    if metric is None:
        return Cell(None)
    limits = metric.interval
    return Cell(metric.value, "" if limits is None else f"{limits[0]:.4g} to {limits[1]:.4g}")


def _title(run: Run, name: str) -> str:
    return COSTS[name] if name in COSTS else run.metric(name).title


def _axes(run: Run) -> dict[str, str]:
    """What can be plotted: costs and metrics that have a better and a worse end, by their headings."""
    costs = {title: name for name, title in COSTS.items() if any(entry.value(name) is not None for entry in run.entries)}
    known = [name for name in run.metrics if run.metric(name).better in ARROWS]
    return costs | {_heading(run.metric(name)): name for name in known}


def _first(run: Run, *names: str) -> str | None:
    known = _axes(run).values()
    return next((name for name in names if name in known), next(iter(known), None))


def _plot(run: Run, across: str, up: str) -> str:
    front, points = run.front(tuple(dict.fromkeys((across, up)))), []
    for number, (entry, best) in enumerate(zip(run.entries, front, strict=True), 1):
        x, y = entry.value(across), entry.value(up)
        if x is not None and y is not None:
            points.append(plots.Point(number, entry.label, x, y, _interval(entry, across), _interval(entry, up), best))
    x_title, y_title = (f"{_title(run, name)} ({run.better(name)} is better)" for name in (across, up))
    figure = plots.pareto(points, x_title, y_title, run.better(across) == "lower")
    best_of = ", ".join(point.label for point in points if point.on_front)
    return plots.shown(figure, f"{y_title} over {x_title} of {len(points)} guidances; on the Pareto front: {best_of}"[:600])


def _interval(entry: Entry, name: str) -> tuple[float, float] | None:
    return entry.metrics[name].interval if name in entry.metrics else None


def _grids(run: Run) -> tuple[list[tuple[Image, str]], str]:
    """The pictures of a run with captions, and what is wrong with those that cannot be read."""
    found, problem = [], ""
    for entry in [entry for entry in run.entries if entry.grid is not None][:GRIDS]:
        try:
            found.append((picture(entry.grid), entry.label))  # type: ignore[arg-type]  # those without one are left out
        except Unreadable as error:
            problem = f"{entry.label}: {error}"
    return found, problem


__all__ = ["TITLE", "build"]
