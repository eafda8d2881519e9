"""The tab of models that draw tokens: the image as it fills in, and speculative decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from PIL.Image import Image

from genkit_apps import jobs, plots
from genkit_apps.app import Context
from genkit_apps.decoding import DRAFTS, Draft, Drawing, Live, draw
from genkit_apps.fields import Fields
from genkit_apps.generation import Asked, Request, check_guidance
from genkit_apps.limits import Refused
from genkit_apps.tables import Cell, Heading, sortable, table
from genkit_apps.ui import AT_ONCE, MODEL_WORK, api_note, beside, canceller, guarded, note, progress, work_key

TITLE = "Autoregressive"
ABOUT = (
    "Models that draw an image token by token, or scale by scale. With speculative decoding a small drafter proposes several "
    "tokens, and one pass of the network settles as many of them as it accepts."
)
HEADINGS = (
    Heading("#"), Heading("decoding", text=True), Heading("tokens/s"), Heading("tokens a pass", "mean accepted length"),
    Heading("passes"), Heading("NFE"), Heading("seconds"), Heading("moved", "probability a token"),
    Heading("guidance", text=True), Heading("model", text=True),
)  # fmt: skip
KEPT = 12
API = """
`/autoregressive` draws an image: it yields step, total and text, and at the end the image (PNG in base64), its cost, and for each
token the pass that settled it. `/autoregressive_draw` and `/autoregressive_cancel` are what the page uses.
"""
CODE = """from gradio_client import Client

client = Client("http://127.0.0.1:7860")
out = client.predict(
    model="builtin/cifar10-next-token", label="horse", guidance="CFG(3.0)", speculative=True, budget=0.2,
    api_name="/autoregressive",
)
print(out["mean_length"], out["seconds"])
"""


def build(app: Context) -> None:
    """Draw the tab."""
    tab = _Tab(app)
    gr.Markdown(ABOUT)
    beside(tab.controls, tab.results)
    tab.events()
    gr.api(tab.endpoint(), api_name="autoregressive", concurrency_id="model", concurrency_limit=1)
    api_note(API, CODE, "ar-api")


class _Tab:
    def __init__(self, app: Context) -> None:
        self.app, self.fields = app, Fields("ar")
        self.names = list(app.models.of_kind("next-token", "next-scale"))

    def controls(self) -> None:
        first = self.app.models.get(self.names[0])
        self.model, self.label, self.prompt, self.seed = self.fields.subject(self.names, first, self.app.limits)
        self.guidance = gr.Textbox(
            "CFG(3.0)", label="Guidance", info="an expression; a model tuned by CCA needs none: write none",
            elem_id="ar-guidance", max_length=self.app.limits.expression,
        )  # fmt: skip
        self.fields.slot("guidance")
        self.temperature = gr.Slider(0, 2, value=1, step=0.05, label="Temperature", elem_id="ar-temperature")
        self.fields.slot("temperature")
        self.speculative = gr.Checkbox(True, label="Speculative decoding", elem_id="ar-speculative")
        self.fields.slot("speculative")
        with gr.Group(elem_id="ar-draft") as self.draft:
            self.budget = gr.Slider(
                0, 0.5, value=0, step=0.01, label="Total-variation budget", elem_id="ar-budget",
                info="probability that may move to a token (LANTERN's delta); 0 draws exactly as the network does",
            )  # fmt: skip
            self.fields.slot("budget")
            self.k = gr.Slider(
                1, 1000, value=100, step=1, label="Neighbours k", elem_id="ar-k", info="codes that a token may stand for"
            )
            self.fields.slot("k")
            self.tree = gr.Dropdown(list(DRAFTS), value=DRAFTS[0], label="Drafted tree", elem_id="ar-tree")
            self.fields.slot("tree")
            self.length = gr.Slider(1, 8, value=4, step=1, label="Levels of the tree", elem_id="ar-length")
            self.fields.slot("length")

    def results(self) -> None:
        with gr.Row():
            self.run = gr.Button("Draw", variant="primary", elem_id="ar-run", min_width=100)
            self.cancel = gr.Button("Cancel", elem_id="ar-cancel", min_width=100)
        self.status = gr.HTML(note("Not run yet."), elem_id="ar-status")
        with gr.Row():
            with gr.Column(min_width=150):
                self.image = gr.HTML(elem_id="ar-image", js_on_load=None)
            with gr.Column(min_width=140):
                self.map = gr.HTML(_map(Live(), 8), elem_id="ar-map", js_on_load=None)
                self.scales = gr.HTML(elem_id="ar-scales", visible=False, js_on_load=None)
        self.runs = sortable("ar-runs")
        self.kept = gr.State([], time_to_live=3600)

    def events(self) -> None:
        draft = [self.speculative, self.budget, self.k, self.tree, self.length]
        asked = [self.model, self.label, self.prompt, self.seed, self.guidance, self.temperature, *draft, self.kept]
        shown = [self.status, self.image, self.map, self.scales, self.runs, self.kept, *self.fields.outputs]
        self.run.click(guarded(self.work), asked, shown, api_name="autoregressive_draw", **MODEL_WORK)
        self.cancel.click(guarded(canceller("autoregressive")), None, self.status, api_name="autoregressive_cancel", **AT_ONCE)
        self.speculative.change(
            lambda on: gr.update(visible=bool(on)),
            self.speculative,
            self.draft,
            api_name="autoregressive_speculative",
            api_visibility="undocumented",
            **AT_ONCE,
        )
        self.model.change(
            guarded(self.choose), self.model, [self.label, self.prompt, self.speculative, self.map, self.scales],
            api_name="autoregressive_model", api_visibility="undocumented", **AT_ONCE,
        )  # fmt: skip

    def work(
        self, model: str, label: str, prompt: str, seed: str, guidance: str, temperature: float, speculative: bool,
        budget: float, k: int, tree: str, length: int, kept: list[list[Any]], request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Draw one image. Yields status, image, token map, images after each scale, and the table of runs."""
        rest, live = [gr.skip()] * 5, Live()
        yield [note("Waiting for the model."), *rest, *self.fields.told()]
        try:
            draft = Draft(budget, k, tree, length) if speculative else None
            ask, work = self.planned(Asked(model, label, prompt, seed), guidance, temperature, draft, live)
            use = draft is not None and ask.model.kind == "next-token"
            for event in jobs.stream(work, work_key("autoregressive", request)):
                if isinstance(event, Drawing):
                    how = f"speculative: {f'budget {budget:g}, k {k}' if budget else 'exact'}, {tree}" if use else "one by one"
                    yield [*_done(event, ask, how, kept), *self.fields.told()]
                else:
                    yield [progress(event), *_so_far(event, ask, live, use), gr.skip(), gr.skip(), *self.fields.told()]
        except jobs.Cancelled:
            yield [note("Cancelled."), *rest, *self.fields.told()]
        except ValueError as error:
            yield [note(""), *rest, *self.fields.told(_refused(error))]

    def planned(
        self, asked: Asked, guidance: Any, temperature: Any, draft: Draft | None, live: Live
    ) -> tuple[Request, Callable[[jobs.Job], Drawing]]:
        """The request of one image, and the work that draws it. Raises Refused."""
        limits = self.app.limits
        found, ask = limits.guidance(guidance), asked.checked(self.app.models, limits)
        heat = _checked(ask, temperature)
        check_guidance(found, ask, limits)
        use = draft is not None and ask.model.kind == "next-token"
        drafted = draft.speculative(ask.model, limits) if use and draft is not None else None
        return ask, lambda job: draw(ask, found, live, job, limits, drafted=drafted, temperature=heat)

    def endpoint(self) -> Any:
        """The function of the API: the last value is the result, those before it say how far it is."""

        def api(
            model: str = self.names[0],
            label: str = "horse",
            prompt: str = "",
            seed: str = "0",
            guidance: str = "CFG(3.0)",
            temperature: float = 1.0,
            speculative: bool = True,
            budget: float = 0.0,
            k: int = 100,
            tree: str = DRAFTS[0],
            levels: int = 4,
        ) -> Iterator[dict[str, Any]]:
            """One image of a model that draws tokens.

            Parameters:
                model: one of the models of the tab.
                label: name or number of the class.
                prompt: in its place, for models of text.
                seed: a whole number.
                guidance: an expression.
                temperature: of the draws.
                speculative: whether a drafter proposes tokens.
                budget: probability that may move to a token, from 0 (exact) to 1.
                k: codes that a token may stand for.
                tree: what is drafted, as in the page.
                levels: of the drafted tree.

            Returns:
                image (PNG in base64), guidance, tokens, passes, nfe, seconds, mean_length; before that step, total and text.
            """
            try:
                draft = Draft(budget, k, tree, levels) if speculative else None
                _, work = self.planned(Asked(model, label, prompt, seed), guidance, temperature, draft, Live())
                for event in jobs.stream(work):
                    if isinstance(event, Drawing):
                        yield _plain(event)
                    else:
                        yield event.place()
            except ValueError as error:
                raise _refused(error) from None

        return guarded(api)

    def choose(self, name: str) -> list[Any]:
        """The controls that a model has."""
        model = self.app.models.get(name)
        text, by_token = model.num_classes is None, model.kind == "next-token"
        side = _side(model.pipe.steps) if by_token else 8
        return [
            gr.update(**model.choice()),
            gr.update(visible=text),
            gr.update(value=by_token, visible=by_token),
            gr.update(visible=by_token, value=_map(Live(), side)),
            gr.update(visible=not by_token, value=""),
        ]


def _refused(error: ValueError) -> Refused:
    """Where to tell an error: what the model itself refuses, or cannot do, is put down to the guidance or to drafted tokens."""
    text = str(error)
    return error if isinstance(error, Refused) else Refused("speculative" if text.startswith("speculative") else "guidance", text)


def _plain(drawing: Drawing) -> dict[str, Any]:
    """A drawing for programs; ``passes`` has for each token the pass that settled it."""
    mean = None if drawing.report is None else drawing.report.mean_length
    cost = {"nfe": drawing.nfe, "seconds": drawing.seconds, "mean_length": mean}
    made = {"guidance": drawing.guidance, "tokens": drawing.tokens, "passes": plots.passes_of(drawing.counts)}
    return {"image": plots.png(drawing.image), **made, **cost}


def _checked(ask: Request, temperature: Any) -> float:
    if len(ask.seeds) > 1:
        raise Refused("seeds", "one image is drawn here; give one seed and one class")
    if ask.model.kind == "diffusion":
        raise Refused("model", f"{ask.model.name} draws no tokens; choose one that does")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 10:
        raise Refused("temperature", f"{str(temperature)[:40]} must be a number from 0 to 10")
    return float(temperature)


def _so_far(event: jobs.Event, ask: Request, live: Live, use: bool) -> list[Any]:
    """Image, token map and scales of a drawing that is going on."""
    image = _image(event.images[0], event.text) if event.images and event.images[0] else gr.skip()
    if ask.model.kind == "next-scale":
        return [image, gr.skip(), _scales(live.scales)]
    return [image, _map(live, _side(ask.total), use), gr.skip()]


def _done(drawing: Drawing, ask: Request, how: str, kept: list[list[Any]]) -> list[Any]:
    """Status, image, token map, scales and runs of a drawing that is finished."""
    report, rate = drawing.report, drawing.tokens / max(drawing.seconds, 1e-9)
    spent = None if report is None else float(f"{report.spent:.3g}")
    passes = None if report is None else int(report.passes[0]) + 1
    mean = None if report is None else round(report.mean_length, 2)
    number = kept[0][0] + 1 if kept else 1
    cost = [round(rate, 1), mean, passes, drawing.nfe, round(drawing.seconds, 2), spent]
    row = [number, how, *cost, drawing.guidance, ask.model.name]
    kept = [row, *kept][:KEPT]
    told = f"{drawing.tokens} tokens in {drawing.seconds:.2f} s: {rate:.1f} tokens/s, {drawing.nfe} network evaluations"
    if report is not None:
        told += f" · mean accepted length {mean} ({passes} passes) · probability moved for a token: {spent:g}"
    scales = _scales(drawing.scales) if drawing.scales else gr.skip()
    drawn = _mapped(drawing.counts, _side(drawing.tokens)) if drawing.counts else gr.skip()
    return [note(told), _image(drawing.image), drawn, scales, _table(kept), kept]


def _table(kept: Sequence[Sequence[Any]]) -> str:
    return table("Runs of this session, newest first", HEADINGS, [[Cell(value) for value in row] for row in kept])


def _map(live: Live, side: int, use: bool = False) -> str:
    counts = [1, *live.counts] if use and live.counts else list(live.counts)
    return _mapped(counts, side)


def _mapped(counts: Sequence[int], side: int) -> str:
    caption = "Accepted lengths: which pass settled which tokens"
    told = f'<figcaption style="font-size:.85rem;padding-bottom:.25rem">{caption}</figcaption>'
    return f'<figure style="margin:0">{told}{plots.token_map(plots.passes_of(counts), side)}</figure>'


def _image(image: Image, where: str = "") -> str:
    return plots.picture(image, f"Image at {where}" if where else "Image", f"The image at {where or 'the end'}")


def _scales(images: Sequence[Image]) -> str:
    parts = (
        plots.picture(image, f"scale {number}", f"The image after scale {number}", 110) for number, image in enumerate(images, 1)
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:.6rem">{"".join(parts)}</div>'


def _side(tokens: int) -> int:
    return max(math.isqrt(tokens), 1)


__all__ = ["TITLE", "build"]
