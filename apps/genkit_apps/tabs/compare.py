"""Compare: one model, the same classes and seeds, two to six guidances side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from genkit_apps import cards, jobs
from genkit_apps.app import Context
from genkit_apps.board import board
from genkit_apps.bundle import numbered, snippet, write_bundle
from genkit_apps.card_view import Card, card, updates
from genkit_apps.comparison import as_plain, compare, plan
from genkit_apps.generation import Asked, Column, Request
from genkit_apps.ui import AT_ONCE, MODEL_WORK, REDRAW, api_note, guarded, note, problem, progress, shown

TITLE = "Compare"

#: Cards at the beginning.
SHOWN = 3
FIELDS = ("model", "classes", "prompt", "seeds", "sampler", "steps")
IMAGES, DIFFERENCE = "Images", "Difference from column 1"

API = """from gradio_client import Client

client = Client("http://127.0.0.1:7860")  # with a password: auth=("any name", "the password")
out = client.predict(
    model="builtin/cifar10",
    guidances=["none", "CFG(3.0)", "Interval(APG(4.0), 0.28, 5.42)"],
    classes=["cat", "ship"],
    seeds="0-3",
    sampler="dpmpp_2m",
    steps=18,
    api_name="/compare",
)
print(out["record"]["columns"][1]["nfe"])  # out["images"][column][k]: PNG in base64; out["python"]: the same without the app
"""


class Settings(NamedTuple):
    """The fields above the cards, and the places of their messages."""

    model: gr.Dropdown
    classes: gr.Dropdown
    prompt: gr.Textbox
    seeds: gr.Textbox
    sampler: gr.Dropdown
    steps: gr.Number
    problems: dict[str, gr.HTML]

    @property
    def inputs(self) -> list[Any]:
        return [getattr(self, name) for name in FIELDS]


class Outcome(NamedTuple):
    """What shows how it goes, and what came of it."""

    status: gr.HTML
    board: gr.HTML
    view: gr.Radio
    gain: gr.Slider
    download: gr.DownloadButton
    code: gr.Code
    result: gr.State  # (Request, columns) of the last comparison


def build(app: Context) -> None:
    """Draw the tab."""
    settings = _settings(app)
    count = gr.State(SHOWN)
    with gr.Row(elem_classes="gk-cards"):
        first = cards.FIRST[app.models.kind(app.models.names[0])]
        made = [card("compare", k + 1, first[k] if k < SHOWN else None, app.limits) for k in range(app.limits.columns)]
    with gr.Row(elem_classes="gk-actions"):
        generate = gr.Button("Generate", variant="primary", elem_id="compare-generate", min_width=160, scale=3)
        cancel = gr.Button("Cancel", elem_id="compare-cancel", min_width=120, scale=1)
        add = gr.Button("Add a guidance", elem_id="compare-add", min_width=140, scale=1)
    outcome = _outcome()
    _arrange(app, made, count, add, settings.model)
    handler = guarded(_handler(app, settings, made, outcome))
    inputs = [*settings.inputs, outcome.view, outcome.gain, count, *(c.expression for c in made)]
    outputs = [*settings.problems.values(), *(c.problem for c in made), *outcome[:2], *outcome[4:]]
    running = generate.click(handler, inputs, outputs, **MODEL_WORK, api_name="compare_generate")
    stopping = cancel.click(guarded(_cancel), None, outcome.status, **AT_ONCE, api_name="compare_cancel")
    stopping.then(None, cancels=[running])  # one that still waits in the queue
    for change in (outcome.view.change, outcome.gain.change):  # a slider's release does not come from the keyboard
        change(
            guarded(_redraw),
            [outcome.result, outcome.view, outcome.gain],
            [outcome.board],
            **AT_ONCE,
            trigger_mode="always_last",
            api_name="compare_view",
        )
    follow = guarded(lambda name: _fitting(app, name))
    places = [*settings.inputs[1:], *settings.problems.values()]
    settings.model.change(follow, settings.model, places, **AT_ONCE, api_name="compare_model")
    gr.api(_endpoint(app), api_name="compare", concurrency_id="model", concurrency_limit=1)
    api_note("The whole comparison is one call; it can be iterated over for progress, and cancelled.", API, "compare-api")


def _settings(app: Context) -> Settings:
    problems = dict[str, gr.HTML]()
    first = app.models.get(app.models.names[0])
    fields, fitting = dict[str, Any](), _fields_of(app, first.name)

    def place(name: str, component: Any) -> None:
        fields[name], problems[name] = component, problem(f"compare-{name}-error")

    with gr.Row(elem_classes="gk-settings"):
        with gr.Column(min_width=220, scale=2):
            place("model", gr.Dropdown(list(app.models.names), value=first.name, label="Model", elem_id="compare-model"))
        with gr.Column(min_width=260, scale=3):
            place(
                "classes",
                gr.Dropdown(
                    multiselect=True, allow_custom_value=True, label="Classes", elem_id="compare-classes", **fitting["classes"]
                ),
            )
            place("prompt", gr.Textbox("", label="Prompt", elem_id="compare-prompt", lines=1, max_lines=4, **fitting["prompt"]))
        with gr.Column(min_width=120, scale=1):
            place("seeds", gr.Textbox("0-1", label="Seeds", placeholder="0, 1, 5-8", elem_id="compare-seeds"))
        with gr.Column(min_width=190, scale=1):
            place(
                "sampler", gr.Dropdown(allow_custom_value=True, label="Sampler", elem_id="compare-sampler", **fitting["sampler"])
            )
        with gr.Column(min_width=100, scale=1):
            place("steps", gr.Number(18, label="Steps", elem_id="compare-steps", step=1, **fitting["steps"]))
    return Settings(**fields, problems=problems)


def _outcome() -> Outcome:
    status = gr.HTML(note("Choose, then press Generate."), elem_id="compare-status", js_on_load=None)
    with gr.Row(elem_classes="gk-view"):
        view = gr.Radio([IMAGES, DIFFERENCE], value=IMAGES, label="Show", elem_id="compare-view")
        gain = gr.Slider(1, 20, value=4, step=1, label="Difference multiplied by", elem_id="compare-gain")
    pictures = gr.HTML("", elem_id="compare-board", js_on_load=None)
    result = gr.State(None, time_to_live=3600)
    download = gr.DownloadButton(
        "Download images, JSON and Python", value=None, interactive=False, elem_id="compare-download", size="md"
    )
    with gr.Accordion("Python that makes the same images", open=False, elem_id="compare-python"):
        code = gr.Code("", language="python", interactive=False, label="Python", elem_id="compare-code")
    return Outcome(status, pictures, view, gain, download, code, result)


def _fields_of(app: Context, name: str) -> dict[str, dict[str, Any]]:
    """What the fields offer for a model."""
    model = app.models.get(name)
    diffusion, names = model.kind == "diffusion", model.choices
    first = [names[k] for k in (1, 7) if k < len(names)] or names[:1]
    sampler = model.samplers[0] if model.diffusers else "dpmpp_2m"
    return {
        "classes": {**model.choice(), **({"value": first} if names else {})},
        "prompt": {"visible": model.num_classes is None},
        "sampler": {"choices": model.samplers, "value": sampler, "visible": diffusion},
        "steps": {"visible": diffusion},
    }


def _fitting(app: Context, name: str) -> list[Any]:
    """The fields as a model has them, without messages."""
    fields = _fields_of(app, name)
    return [*(gr.update(**fields.get(key, {})) for key in FIELDS[1:]), *[shown("")] * len(FIELDS)]


def _arrange(app: Context, made: Sequence[Card], count: gr.State, add: gr.Button, model: gr.Dropdown) -> None:
    """Add and remove cards: the others move up. What nobody has edited follows the kind of the model."""

    def fit(name: str, texts: Sequence[str]) -> list[str]:
        return [cards.fitting(text, app.models.kind(name)) for text in texts]

    def updated(name: str, texts: Sequence[str]) -> list[Any]:
        every: list[str | None] = [*fit(name, texts), *[None] * (len(made) - len(texts))]
        return [len(texts), *(update for text in every for update in updates(text, app.limits))]

    def one_more(name: str, number: int, *texts: str) -> list[Any]:
        new = [*texts[:number], *cards.FIRST[app.models.kind(name)][number : number + 1]]
        return updated(name, new[: len(made)])

    def follow(name: str, *texts: str) -> list[Any]:
        kept, pairs = [gr.skip()] * len(made[0].outputs), zip(texts, fit(name, texts), strict=True)
        return [update for old, new in pairs for update in (kept if old == new else updates(new, app.limits))]

    def without(k: int) -> Any:
        def remove(name: str, number: int, *texts: str) -> list[Any]:
            kept = [text for j, text in enumerate(texts[:number]) if j != k]
            return updated(name, kept if len(kept) >= 2 else texts[:number])

        return remove

    expressions, places = [c.expression for c in made], [o for c in made for o in c.outputs]
    inputs, outputs = [model, count, *expressions], [count, *places]
    name = "compare_follow"
    model.change(guarded(follow), [model, *expressions], places, **REDRAW, api_name=name, api_visibility="undocumented")
    add.click(guarded(one_more), inputs, outputs, **REDRAW, api_name="compare_add", api_visibility="undocumented")
    for k, one in enumerate(made):
        name = f"compare_remove_{k + 1}"
        one.remove.click(guarded(without(k)), inputs, outputs, **REDRAW, api_name=name, api_visibility="undocumented")


def _handler(app: Context, settings: Settings, made: Sequence[Card], outcome: Outcome) -> Any:
    """The event of the Generate button: updates of messages, status, pictures and downloads while it goes on."""

    def told(problems: dict[str, str]) -> dict[Any, Any]:
        places = {**settings.problems, **{f"guidance {k}": c.problem for k, c in enumerate(made, 1)}}
        return {place: shown(problems.get(name, "")) for name, place in places.items()}

    def generate(
        request: gr.Request,
        model: str,
        classes: list[str] | None,
        prompt: str,
        seeds: str,
        sampler: str | None,
        steps: float | None,
        view: str,
        gain: float,
        count: int,
        guidance_1: str = "",
        guidance_2: str = "",
        guidance_3: str = "",
        guidance_4: str = "",
        guidance_5: str = "",
        guidance_6: str = "",
    ) -> Iterator[dict[Any, Any]]:
        asked = Asked(model, classes or [], prompt, seeds, sampler, steps)
        texts = [guidance_1, guidance_2, guidance_3, guidance_4, guidance_5, guidance_6]
        while len(texts) > count and not texts[-1]:  # cards that are hidden are empty
            texts.pop()
        planned = plan(asked, texts, app.models, app.limits)
        yield {
            **told(planned.problems),
            outcome.status: note("Not started: see the messages." if planned.problems else "Starting …"),
        }
        if planned.request is None:
            return
        yield from follow(planned.request, planned.guidances, _gain(view, gain), request.session_hash)

    def follow(request: Request, guidances: Any, gain: float | None, key: str | None) -> Iterator[dict[Any, Any]]:
        columns, ended = tuple[Column, ...](), "Done."
        try:
            for snapshot in compare(request, guidances, app.limits, key):
                columns, update = snapshot.columns, dict[Any, Any]()
                if snapshot.event is not None:
                    update[outcome.status] = progress(snapshot.event)
                if snapshot.event is None or snapshot.event.kind != "progress" or snapshot.event.step == 1:
                    update[outcome.board] = board(request, columns, gain, snapshot.working)
                yield update
        except jobs.Cancelled:
            columns, ended = tuple(c if c.nfe else Column(c.guidance) for c in columns), "Cancelled."
        wrong = {f"guidance {k}": c.error for k, c in enumerate(columns, 1) if c.error}
        done = any(c.images for c in columns)
        yield {
            **told(wrong),
            outcome.status: note(f"{ended} {'Not every guidance worked: see the messages.' if wrong else ''}".strip()),
            outcome.board: board(request, columns, gain),
            outcome.result: (request, columns),
            outcome.code: snippet(request, numbered(columns)) if done else "",
            outcome.download: gr.update(value=str(_bundle(app.folder, request, columns)) if done else None, interactive=done),
        }

    return generate


def _bundle(folder: Path, request: Request, columns: Sequence[Column]) -> Path:
    """The zip, in a new folder in the app's own."""
    return write_bundle(Path(tempfile.mkdtemp(dir=folder)), request, columns)


def _gain(view: str, gain: float) -> float | None:
    return float(gain) if view == DIFFERENCE else None


def _redraw(result: Any, view: str, gain: float) -> str:
    """The pictures of the last comparison in another view."""
    if result is None:
        return ""
    request, columns = result
    return board(request, columns, _gain(view, gain))


def _cancel(request: gr.Request) -> str:
    """Stop this session's work at its next step, and give it a moment to show what there is."""
    found = jobs.cancel(request.session_hash or "", wait=15.0)
    return note("Cancelled." if found else "Nothing is running.")


def _endpoint(app: Context) -> Any:
    """The function of the API: the last value is the result, those before it say how far it is."""
    first = list(cards.FIRST[app.models.kind(app.models.names[0])][:SHOWN])

    def api(
        model: str = app.models.names[0],
        guidances: list[str] = first,
        classes: list[str] = [],  # noqa: B006
        prompt: str = "",
        seeds: str = "0",
        sampler: str = "dpmpp_2m",
        steps: int = 18,
    ) -> Iterator[dict[str, Any]]:
        """Images of several guidances on the same classes (or prompt) and seeds, with their cost.

        Parameters:
            model: one of the models of the app.
            guidances: expressions, 1 to 6.
            classes: names or numbers; each goes with each seed.
            prompt: for models of text.
            seeds: such as "0, 1, 5-8".
            sampler: name or expression.
            steps: of the sampler.

        Returns:
            record, python, images (PNG in base64, by column); before that step, total and text.
        """
        planned = plan(Asked(model, classes, prompt, seeds, sampler, steps), guidances, app.models, app.limits)
        if planned.request is None:
            raise gr.Error("; ".join(f"{k}: {v}" for k, v in planned.problems.items()), print_exception=False)
        for snapshot in compare(planned.request, planned.guidances, app.limits):
            if snapshot.event is not None:
                yield snapshot.event.place()
            else:
                yield as_plain(planned.request, snapshot.columns)

    return guarded(api)


__all__ = ["TITLE", "build"]
