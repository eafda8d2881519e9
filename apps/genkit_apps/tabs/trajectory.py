"""The tab that follows one image through its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL.Image import Image

from genkit.guidance import Guidance
from genkit_apps import jobs, plots
from genkit_apps.app import Context
from genkit_apps.cards import expression
from genkit_apps.fields import Fields
from genkit_apps.generation import Asked, Request, check_guidance
from genkit_apps.limits import Refused
from genkit_apps.models import Model
from genkit_apps.range_slider import range_slider
from genkit_apps.trajectories import Trajectory, band, follow, limited
from genkit_apps.ui import AT_ONCE, MODEL_WORK, api_note, beside, canceller, guarded, note, progress, work_key

TITLE = "Trajectory"
WHOLE = (0.0, 80.0)
ABOUT = (
    "What guidance does on the way to one image. The band in the plots marks the noise levels in which it acts: move the ends of "
    "the interval, and run again."
)

API = """
`/trajectory` follows an image: it yields step, total and text, and at the end the trace, the cost, the image, and what each step
believed (PNG in base64). `/trajectory_interval` rewrites a guidance for another interval of noise levels, `/trajectory_guidance`
reads the interval of one. `/trajectory_run`, `/trajectory_step` and `/trajectory_cancel` are what the page uses.
"""
CODE = """from gradio_client import Client

client = Client("http://127.0.0.1:7860")
guidance, *_ = client.predict([0.28, 5.42], "CFG(3.0)", 1, api_name="/trajectory_interval")
out = client.predict("builtin/cifar10", "horse", "0", guidance, "heun", 18, api_name="/trajectory")
print(out["nfe"], [(row["sigma"], row["weight"]) for row in out["trace"]])
"""


def build(app: Context) -> None:
    """Draw the tab."""
    tab = _Tab(app)
    gr.Markdown(ABOUT)
    beside(tab.controls, tab.results)
    tab.events()
    gr.api(tab.endpoint(), api_name="trajectory", concurrency_id="model", concurrency_limit=1)
    api_note(API, CODE, "trajectory-api")


class _Tab:
    def __init__(self, app: Context) -> None:
        self.app, self.fields = app, Fields("trajectory")
        self.names = list(app.models.of_kind("diffusion"))

    def controls(self) -> None:
        first = self.app.models.get(self.names[0])
        self.model, self.label, self.prompt, self.seed = self.fields.subject(self.names, first, self.app.limits)
        self.guidance = gr.Textbox(
            "Interval(CFG(3.0), 0.28, 5.42)", label="Guidance", info="an expression, such as CFG(3.0) or APG(4.0)",
            elem_id="trajectory-guidance", max_length=self.app.limits.expression,
        )  # fmt: skip
        self.fields.slot("guidance")
        self.sampler = gr.Dropdown(
            label="Sampler", allow_custom_value=True, elem_id="trajectory-sampler",
            info="a name, or an expression such as heun(churn=40)", **_samplers(first),
        )  # fmt: skip
        self.fields.slot("sampler")
        self.steps = gr.Slider(1, self.app.limits.steps, value=18, step=1, label="Steps", elem_id="trajectory-steps")
        self.fields.slot("steps")

    def results(self) -> None:
        with gr.Row():
            self.run = gr.Button("Run", variant="primary", elem_id="trajectory-run", min_width=100)
            self.cancel = gr.Button("Cancel", elem_id="trajectory-cancel", min_width=100)
        self.status = gr.HTML(note("Not run yet."), elem_id="trajectory-status")
        with gr.Row():
            with gr.Column(min_width=140):
                self.preview = gr.HTML(elem_id="trajectory-preview", js_on_load=None)
            with gr.Column(min_width=140):
                self.final = gr.HTML(elem_id="trajectory-image", js_on_load=None)
        self.step = gr.Slider(1, 18, value=1, step=1, label="Step to look at", elem_id="trajectory-step", interactive=True)
        self.told = gr.HTML(elem_id="trajectory-told")
        self.interval = range_slider((0.28, 5.42), label="Guidance interval (noise level sigma)", elem_id="trajectory-interval")
        self.fields.slot("interval")
        self.plot = gr.HTML(_plot(None), elem_id="trajectory-plot", padding=False)
        self.kept = gr.State(None, time_to_live=3600)

    def events(self) -> None:
        asked = [self.model, self.label, self.prompt, self.seed, self.guidance, self.sampler, self.steps]
        shown = [self.status, self.preview, self.final, self.step, self.told, self.plot, self.kept, *self.fields.outputs]
        self.run.click(guarded(self.work), asked, shown, api_name="trajectory_run", **MODEL_WORK)
        self.cancel.click(guarded(canceller("trajectory")), None, self.status, api_name="trajectory_cancel", **AT_ONCE)
        look = [self.preview, self.told, self.plot]
        self.step.change(
            guarded(self.look), [self.step, self.kept, self.guidance], look, api_name="trajectory_step",
            queue=False, show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        band_of = [self.guidance, self.plot, *self.fields.outputs]
        self.interval.release(
            guarded(self.move), [self.interval, self.guidance, self.step, self.kept], band_of,
            api_name="trajectory_interval", **AT_ONCE,
        )  # fmt: skip
        for event, name in ((self.guidance.blur, "trajectory_guidance"), (self.guidance.submit, "trajectory_guidance_submit")):
            event(
                guarded(self.read), [self.guidance, self.step, self.kept], [self.interval, self.plot, *self.fields.outputs],
                api_name=name, **AT_ONCE,
            )  # fmt: skip
        self.model.change(
            guarded(self.choose), self.model, [self.label, self.prompt, self.sampler, *self.fields.outputs],
            api_name="trajectory_model", api_visibility="undocumented", **AT_ONCE,
        )  # fmt: skip

    def work(
        self, model: str, label: str, prompt: str, seed: str, guidance: str, sampler: str, steps: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Follow one image. Returns status, the image the first step believed in, the result, and the trace as a picture."""
        rest = [gr.skip()] * 6
        yield [note("Waiting for the model."), *rest, *self.fields.told()]
        try:
            ask, found = self.checked(Asked(model, label, prompt, seed, sampler, steps), guidance)
            for event in jobs.stream(lambda job: follow(ask, found, job, self.app.limits), work_key("trajectory", request)):
                if isinstance(event, Trajectory):
                    yield [*self.done(event), *self.fields.told()]
                else:
                    image = _estimate(event.images[0], event.text) if event.images and event.images[0] else gr.skip()
                    yield [progress(event), image, *rest[1:], *self.fields.told()]
        except jobs.Cancelled:
            yield [note("Cancelled."), *rest, *self.fields.told()]
        except ValueError as error:
            yield [note("Stopped: see the message."), *rest, *self.fields.told(_refused(error))]

    def checked(self, asked: Asked, guidance: Any) -> tuple[Request, Guidance]:
        """The request of one image, and its guidance. Raises Refused."""
        limits = self.app.limits
        found, ask = limits.guidance(guidance), asked.checked(self.app.models, limits)
        if ask.model.name not in self.names:
            raise Refused("model", f"{ask.model.name} cannot be followed; use one of {', '.join(self.names)}")
        if len(ask.seeds) > 1:
            raise Refused("seeds", "one image is followed here; give one seed and one class")
        check_guidance(found, ask, limits)
        return ask, found

    def endpoint(self) -> Any:
        """The function of the API: the last value is the result, those before it say how far it is."""

        def api(
            model: str = self.names[0],
            label: str = "horse",
            seed: str = "0",
            guidance: str = "Interval(CFG(3.0), 0.28, 5.42)",
            sampler: str = "heun",
            steps: int = 18,
            prompt: str = "",
        ) -> Iterator[dict[str, Any]]:
            """One image, step by step.

            Parameters:
                model: one of the models of the tab.
                label: name or number of the class.
                seed: a whole number.
                guidance: an expression.
                sampler: name or expression.
                steps: of the sampler.
                prompt: for models of text.

            Returns:
                guidance, nfe, seconds, trace (a row for each step), image and previews (PNG in base64); before that step, total
                and text.
            """
            try:
                ask, found = self.checked(Asked(model, label, prompt, seed, sampler, steps), guidance)
                for event in jobs.stream(lambda job: follow(ask, found, job, self.app.limits)):
                    if isinstance(event, Trajectory):
                        images = {"image": plots.png(event.image), "previews": [plots.png(image) for image in event.previews]}
                        about = {"guidance": event.guidance, "nfe": event.nfe, "seconds": event.seconds}
                        yield {**about, "trace": list(event.rows), **images}
                    else:
                        yield event.place()
            except ValueError as error:
                raise _refused(error) from None

        return guarded(api)

    def done(self, path: Trajectory) -> list[Any]:
        count = len(path.previews)
        status = note(
            f"{path.guidance}: {path.nfe} network evaluations, {count} step{'s' if count > 1 else ''}, {path.seconds:.2f} s"
        )
        step = gr.update(value=1, maximum=max(count, 2), visible=count > 1)  # Gradio refuses a slider of one value
        preview, told, plot = self.look(1, path, path.guidance)
        final = plots.picture(path.image, "Result", f"Result with {path.guidance}")
        return [status, preview, final, step, told, plot, path]

    def look(self, step: int, path: Trajectory | None, guidance: str) -> list[Any]:
        """One step of the image that was followed last; the model does not run."""
        if path is None:
            return [gr.skip(), note("Run first; then the slider shows every step."), gr.skip()]
        place = self.app.limits.number(step, "step", 1, len(path.previews)) - 1
        image = _estimate(path.previews[place], f"step {place + 1}")
        return [image, note(_told(path, place)), self.picture(path, step, guidance)]

    def move(self, ends: Any, guidance: str, step: int, path: Trajectory | None) -> list[Any]:
        """Write the guidance anew, with another interval; the band in the plots is an outline until it runs."""
        try:
            if not isinstance(ends, list | tuple) or len(ends) not in (2, 3):  # a third one is the slider's mark
                raise Refused("interval", f"{str(ends)[:60]} is no interval; give [lower end, upper end]")
            changed = limited(self.app.limits.guidance(guidance), *ends[:2])
        except Refused as error:
            return [gr.skip(), gr.skip(), *self.fields.told(error)]
        text = expression(changed)
        return [text, self.picture(path, step, text), *self.fields.told()]

    def read(self, guidance: str, step: int, path: Trajectory | None) -> list[Any]:
        """The interval in an expression, as [lower end, upper end]."""
        try:
            found = band(self.app.limits.guidance(guidance)) or WHOLE
        except Refused as error:
            return [gr.skip(), gr.skip(), *self.fields.told(error)]
        return [[found[0], min(found[1], WHOLE[1])], self.picture(path, step, guidance), *self.fields.told()]

    def picture(self, path: Trajectory | None, step: int, guidance: str) -> str:
        """The plots, with the line at a step and the band where the guidance that is written there would act."""
        place = int(step) - 1 if step and math.isfinite(step) else 0
        try:
            asked = self.app.limits.guidance(guidance)
        except Refused:
            return _plot(path, place, None if path is None else path.band)
        text = expression(asked)
        return _plot(path, place, band(asked), pending=path is not None and text != path.guidance)

    def choose(self, name: str) -> list[Any]:
        """The controls that a model has, without messages."""
        model = self.app.models.get(name)
        prompt = gr.update(visible=model.num_classes is None)
        return [gr.update(**model.choice()), prompt, gr.update(**_samplers(model)), *self.fields.told()]


def _samplers(model: Model) -> dict[str, Any]:
    return {"choices": model.samplers, "value": model.samplers[0] if model.diffusers else "heun"}


def _plot(path: Trajectory | None, place: int = 0, ends: tuple[float, float] | None = None, pending: bool = False) -> str:
    if path is None:
        return note("The plots appear here.")
    row = path.rows[min(max(place, 0), len(path.rows) - 1)]
    acts = "" if ends is None else f", guidance {'to act' if pending else 'acts'} where {ends[0]:g} < sigma <= {ends[1]:g}"
    told = f"Weight, cosine of the branches, norm of the update and evaluations over the noise level for {path.guidance}{acts}"
    return path.plots.marked(told, ends, row["sigma"], pending)


def _estimate(image: Image, where: str) -> str:
    return plots.picture(image, f"Estimate of the clean image at {where}", f"Estimate of the clean image at {where}")


def _refused(error: ValueError) -> Refused:
    """Where to tell an error: what the model itself refuses, or cannot do, is put down to the guidance."""
    return error if isinstance(error, Refused) else Refused("guidance", str(error))


def _told(path: Trajectory, place: int) -> str:
    """What a step did, in words."""
    row = path.rows[place]
    parts = [f"Step {place + 1} of {len(path.previews)}", f"sigma {row['sigma']:.4g}", f"weight {row['weight']:.3g}"]
    names = (("cosine", "cosine"), ("update_norm", "update"))
    parts += [f"{name} {row[key]:.4g}" for key, name in names if row.get(key) is not None]
    return " · ".join([*parts, f"{row['rows']} evaluations ({row['branches']})"])


__all__ = ["TITLE", "build"]
