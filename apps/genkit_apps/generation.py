"""One request, whatever the model: checked, generated column by column, stopped at the next step when it is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL.Image import Image

from genkit.guidance import Guidance
from genkit.guidance.base import classes as guidance_classes
from genkit.samplers.autoregressive.guided import check_logits
from genkit_apps.cards import expression
from genkit_apps.jobs import Event, Job
from genkit_apps.limits import Limits, Refused
from genkit_apps.models import BRIDGE, Model, Models

#: Seconds between two previews, and between two notes of progress: a browser needs time to show them.
PREVIEW, PROGRESS = 0.4, 0.2
#: Previews are made no oftener than so many times what the last one took, as those of large models have to be decoded.
PREVIEW_SHARE = 5
#: Fields of guidances that name another model of the run.
_MODEL_FIELDS = {"Autoguidance": "model", "ClassifierGuidance": "model", "MinorityGuidance": "model"}


@dataclass(frozen=True)
class Request:
    """What a column of images is made of: conditions and seeds in pairs, one for each image.

    Attributes:
        classes: indices, or empty for a model of text.
        prompts: texts, or empty for a model of classes.
        sampler, steps: None for models that draw tokens.
    """

    model: Model
    classes: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str | None = None
    steps: int | None = None

    @property
    def total(self) -> int:
        """Steps of a column."""
        return self.steps if self.steps is not None else int(self.model.pipe.steps)

    @property
    def conditions(self) -> dict[str, list[Any]]:
        """Prompts or classes, as the pipeline takes them."""
        by_class = "class_labels" if self.model.diffusers else "classes"
        return {"prompt": list(self.prompts)} if self.prompts else {by_class: list(self.classes)}

    def name(self, k: int) -> str:
        """What image k shows, for people."""
        return self.prompts[k] if self.prompts else self.model.class_label(self.classes[k])


@dataclass(frozen=True)
class Column:
    """The images of one guidance, or why there are none.

    Attributes:
        guidance: as an expression.
        nfe: network rows spent on each image.
        calls: forward passes.
        seconds: the column took, without previews.
    """

    guidance: str
    images: tuple[Image, ...] = ()
    nfe: tuple[int, ...] = ()
    calls: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Asked:
    """What stands in the fields of the page or the API, unchecked."""

    model: str
    classes: Any = ()
    prompt: Any = ""
    seeds: Any = "0"
    sampler: Any = "heun"
    steps: Any = 18

    def checked(self, models: Models, limits: Limits) -> Request:
        """The request, each condition with each seed. Raises Refused, naming the field."""
        if self.model not in models.names:
            raise Refused("model", f"there is no model {str(self.model)[:80]!r} here; use one of {', '.join(models.names)}")
        model = models.get(self.model)
        seeds = limits.seeds(self.seeds)
        classes, prompts = list[int](), list[str]()
        if model.num_classes is None:
            prompts = [limits.prompts(self.prompt)] * len(seeds)
        else:
            chosen = _classes(self.classes, model)
            if len(chosen) * len(seeds) > limits.images:
                count = len(chosen) * len(seeds)
                raise Refused(
                    "seeds", f"{len(chosen)} classes with {len(seeds)} seeds are {count} images; at most {limits.images}"
                )
            classes = [c for c in chosen for _ in seeds]
            seeds = seeds * len(chosen)
        sampler = steps = None
        if model.kind == "diffusion":
            text = str(self.sampler).strip()
            sampler = text if model.diffusers and text == BRIDGE else str(limits.sampler(self.sampler))
            steps = limits.step_count(self.steps)
        return Request(model, tuple(classes), tuple(prompts), tuple(seeds), sampler, steps)


def check_guidance(guidance: Guidance, request: Request, limits: Limits, name: str = "guidance") -> None:
    """Raise Refused for a guidance that the model or the sampler cannot have, as far as can be told before it runs."""
    try:
        if request.model.kind != "diffusion":
            check_logits(guidance)
        elif request.sampler not in (None, BRIDGE):
            limits.sampler(str(request.sampler)).check(guidance)
    except ValueError as error:
        raise Refused(name, in_short(str(error), guidance)) from None
    if not request.model.diffusers:
        _check_models(guidance, request.model, name)


def in_short(text: str, guidance: Guidance) -> str:
    """A message of the library with the guidance, and those inside it, as the page writes them."""
    text = text.removeprefix("guidance=").replace(repr(guidance), expression(guidance))
    for part in guidance.parts:
        text = in_short(text, part)
    return text


def generate(request: Request, guidance: Guidance, job: Job, before: int, total: int, limits: Limits, label: str = "") -> Column:
    """The images of one guidance.

    Emits progress at every step, and previews now and then: what the network believes the images to be.

    Args:
        before, total: steps of the whole job that are done, and all of them.

    Raises:
        Cancelled: at the next step after the job was cancelled.
        Refused: it took longer than the limits allow.
        ValueError: the model cannot have this guidance.
    """
    started, told, cost, spent = time.perf_counter(), 0.0, 0.0, 0.0

    def tell(info: Any, images: Callable[[], Sequence[Image]]) -> None:
        nonlocal told, cost, spent
        job.check()
        if time.perf_counter() - started > limits.seconds:
            raise Refused("steps", f"stopped after {limits.seconds:.0f} seconds; ask for fewer steps or images")
        place, now = before + min(info.index + 1, request.total), time.perf_counter()
        if job.due(max(PREVIEW, PREVIEW_SHARE * cost)):
            pictures = tuple(images())
            cost = time.perf_counter() - now
            spent += cost
            job.emit(Event("preview", place, total, pictures, label))
        elif now - told > PROGRESS:
            told = now
            job.emit(Event("progress", place, total, (), label))

    out = call(request, guidance, tell)
    seconds = time.perf_counter() - started - spent
    return Column(expression(guidance), tuple(out.images), tuple(int(n) for n in out.nfe), int(out.calls), seconds)


def call(
    request: Request,
    guidance: Guidance,
    tell: Callable[[Any, Callable[[], Sequence[Image]]], None],
    trace: Literal["basic", "full"] = "basic",
    largest: int | None = None,
) -> Any:
    """What the model makes of a request.

    Args:
        tell: called at every step with a StepInfo (or a Partial, for models that draw tokens; both have an index), and with a
            function for images of what the network believes then.
        trace: as in the pipelines.
        largest: pixels of these images.
    """
    model = request.model
    given: dict[str, Any] = {**request.conditions, "seeds": list(request.seeds), "guidance": guidance, "trace": trace}
    if model.kind != "diffusion":
        return model.pipe(**given, callback=lambda part: tell(part, lambda: part.images))
    given |= {"sampler": request.sampler, "num_inference_steps" if model.diffusers else "steps": request.steps}
    return model.pipe(**given, callback=lambda i, result: tell(i, lambda: model.pictures(result.denoised, largest)))


def _classes(given: Any, model: Model) -> list[int]:
    """Class indices from a list, or a text with commas, of names and numbers."""
    assert model.num_classes is not None
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else str(given).replace(";", ",").split(",")
    parts = [str(v).strip() for v in values if str(v).strip()]
    if not parts:
        raise Refused("classes", "no class is chosen; choose at least one")
    found = []
    for part in parts:
        number = int(part) if part.isdecimal() and part.isascii() and len(part) < 8 else None
        if number is None and part in model.class_names:
            number = model.class_names.index(part)
        if number is None or number >= model.num_classes:
            names = f", {', '.join(model.class_names[:20])}" if model.class_names else ""
            raise Refused("classes", f"{part[:40]!r} is no class of {model.name}; use 0 to {model.num_classes - 1}{names}")
        found.append(number)
    return found


def _check_models(guidance: Guidance, model: Model, name: str) -> None:
    for part in guidance.parts:
        _check_models(part, model, name)
    kind = type(guidance).__name__
    if kind in _MODEL_FIELDS and guidance_classes().get(kind) is type(guidance):
        wanted = getattr(guidance, _MODEL_FIELDS[kind])
        if wanted not in model.pipe.models:
            there = ", ".join(repr(n) for n in model.pipe.models)
            raise Refused(name, f"{kind} needs a model {wanted!r}, which {model.name} does not have; it has {there}")


__all__ = ["Asked", "Column", "Request", "call", "check_guidance", "generate", "in_short"]
