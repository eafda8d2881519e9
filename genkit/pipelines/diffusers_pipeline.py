"""A diffusers model in genkit's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from genkit.attention import chosen, overrides, use_attention
from genkit.denoiser import Guided, TraceLevel
from genkit.guidance.base import Guidance, is_number
from genkit.guidance.none import NoGuidance
from genkit.guidance.trace import Trace
from genkit.pipelines.attention_diffusers import switched
from genkit.pipelines.compiling import Compiling
from genkit.pipelines.course import Course
from genkit.pipelines.diffusers_denoiser import DiffusersDenoiser
from genkit.pipelines.diffusers_families import find_family, network_name, request
from genkit.pipelines.diffusers_images import decode
from genkit.pipelines.diffusers_run import Draw, Way, prepared, way_of
from genkit.pipelines.diffusion import as_guidance
from genkit.pipelines.hoist import hoist as hoisted
from genkit.samplers.diffusion.loop import Callback, Sampler, Step, sample

OUTPUTS = ("pil", "np", "pt", "latent")
StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


@dataclass
class DiffusersOutput(ImagePipelineOutput):  # type: ignore[misc]  # diffusers has no types
    """diffusers' own output (``images``, also as ``[0]``) with what the images cost.

    Attributes:
        images: PIL images, an array or a tensor.
        nfe: network rows evaluated for each image.
        calls: forward passes of the network.
        trace: one row per guided evaluation.
        attention: what computed it, as :func:`genkit.attention.chosen` says; empty where that was left to diffusers.
    """

    nfe: list[int] = field(default_factory=list)
    calls: int = 0
    trace: Trace = field(default_factory=Trace)
    attention: dict[str, Any] = field(default_factory=dict)


class DiffusersPipeline(Compiling):
    """Images from a diffusers model, by genkit's guidances and samplers.

    ``DiffusersPipeline.from_pretrained("folder or id")("a fox", guidance="Interval(CFG(7.5), 0.28, 5.42)")``. The model's parts,
    its encoding of prompts and its VAE are the diffusers pipeline's own; the loop between them is genkit's.

    Args:
        pipe: a loaded diffusers pipeline: Stable Diffusion 1, 2, XL or 3, PixArt-alpha or -Sigma, or DiT.

    Raises:
        ValueError: a pipeline of another kind, or a network without an unconditional branch.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.family = pipe, find_family(pipe)
        if getattr(self.network.config, "time_cond_proj_dim", None) is not None:
            name = f"pipe.{network_name(pipe)}"
            raise ValueError(
                f"{name} is given its guidance scale as an input (time_cond_proj_dim), so there is nothing left to guide; use "
                "the pipeline itself"
            )

    @classmethod
    def from_pretrained(cls, model: Any, **options: Any) -> DiffusersPipeline:
        """From a folder or an id, by ``diffusers.DiffusionPipeline.from_pretrained`` with its options (``torch_dtype``...)."""
        return cls(DiffusionPipeline.from_pretrained(model, **options))

    @property
    def network(self) -> Any:
        """The part that predicts: the UNet or the transformer."""
        return getattr(self.pipe, network_name(self.pipe))

    @property
    def components(self) -> dict[str, Any]:
        """All parts by name, as diffusers has them."""
        found: dict[str, Any] = self.pipe.components
        return found

    def to(self, *args: Any, **kwargs: Any) -> DiffusersPipeline:
        """Move or cast the parts; returns the pipeline."""
        self.pipe.to(*args, **kwargs)
        return self

    def _compilable(self) -> list[Any]:
        return [self.network]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        class_labels: Any = None,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | str | float | None = None,
        guidance_scale: float | None = None,
        sampler: str | Sampler = "bridge",
        grid: str | Tensor | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        models: Mapping[str, Any] | None = None,
        trace: TraceLevel = "basic",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: Callback | None = None,
        attention: str | None = None,
        hoist: bool = False,
        **encode: Any,
    ) -> DiffusersOutput | tuple[Any]:
        """Images for prompts, or for class labels.

        With the defaults the images are those of the diffusers pipeline itself, for the same generator.

        Args:
            prompt, negative_prompt: one or many. The negative prompt is the "uncond" and the "negative" branch of a guidance.
            class_labels: indices or names, for pipelines by class.
            num_inference_steps: of the scheduler, or of the sampler.
            height, width: in pixels; default: the model's.
            guidance: an object, an expression, or a number w, short for CFG(w).
            guidance_scale: the same as a number, by diffusers' rule that 1 and below is no guidance. If neither is given, the
                pipeline's own default.
            sampler: ``"bridge"``: the pipeline's scheduler; or a sampler of genkit by name, expression or object.
            grid: noise levels for a sampler of genkit, by name or falling; default: those of the scheduler.
            num_images_per_prompt: images of each prompt or label.
            generator: as diffusers uses them, one or one per image; the noise is then the diffusers pipeline's.
            seeds: one integer per image in place of generators: an image does not depend on its batch. Default: 0, 1, ...
            latents: (B, C, h, w) unit noise to start from.
            models: further models a guidance asks for; a network like the pipeline's own becomes a denoiser as it does.
            trace: ``"none"``, ``"basic"`` or ``"full"``.
            output_type: ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W) in [0, 1], or ``"latent"``.
            return_dict: False for the tuple ``(images,)``.
            callback_on_step_end: ``f(pipe, step, timestep, {"latents": x})`` after each step, with the diffusers pipeline;
                what it returns may hold new latents. They are scaled as the pipeline's scheduler keeps them. ``pipe._interrupt =
                True`` leaves out the steps that remain.
            callback_on_step_end_tensor_inputs: ``["latents"]`` is all there is.
            callback: called with (StepInfo, Result) after the first evaluation of every step; :meth:`decode` shows what the
                network believes then, ``result.denoised``.
            attention: a backend of :mod:`genkit.attention` for this call; default: as the network was set.
            hoist: compute what is the same at every step once, see :func:`genkit.pipelines.hoist.hoist`.
            encode: further arguments of the pipeline's own ``encode_prompt``: ``prompt_embeds``, ``clip_skip``...

        Raises:
            ValueError: an argument that does not fit, by name, with what would.
        """
        _check(output_type, callback_on_step_end_tensor_inputs)
        rule = self._guidance(guidance, guidance_scale)
        size = (height, width)
        ask = request(self.pipe, prompt, negative_prompt, class_labels, num_images_per_prompt, size, encode)
        cond, uncond = self.family.encode(self.pipe, ask)
        conditions = {"cond": cond, "uncond": uncond, **({} if negative_prompt is None else {"negative": uncond})}
        draw = Draw(ask.latents(cond), ask.device, ask.dtype(cond), generator, seeds)
        scheduler = prepared(self.pipe, self.network, num_inference_steps, draw.shape)
        course, way = Course(scheduler, (1.0, 0.0), scheduler.timesteps[0], None), way_of(sampler, grid, scheduler)
        x = way.size * _given(latents, draw)
        nets = {"main": self.network, **(models or {})}
        nets = {k: DiffusersDenoiser(m, course, draw.shape) if isinstance(m, type(self.network)) else m for k, m in nets.items()}
        run = Guided(nets, rule, conditions, len(x), trace, draw.seeds)
        self.pipe._interrupt = False
        computing = self._computing(attention, hoist, scheduler.timesteps)
        with self.pipe.progress_bar(total=len(way.sigmas) - 1) as bar, computing as choice:
            solver = self._watched(way, course, callback_on_step_end, bar)
            x = sample(run, x, way.sigmas, solver, way.path, draw, callback)
        end = float(way.sigmas[-1])
        x = x * (course.path(end)[0] / way.path(end)[0])  # a scheduler may end a little above 0
        images = decode(self.pipe, x, output_type)
        self.pipe.maybe_free_model_hooks()
        out = DiffusersOutput(images, run.ledger.nfe, run.ledger.calls, run.trace, choice)
        return out if return_dict else (images,)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latents (B, C, h, w) as images, as a call returns them: safety checker and watermark act here, too.

        Args:
            output_type: ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W) in [0, 1]; ``"latent"`` returns the latents.

        Raises:
            ValueError: they are not finite, or an unknown output type.
        """
        _check(output_type, ["latents"])
        return decode(self.pipe, latents, output_type)

    @contextmanager
    def _computing(self, attention: str | None, hoist: bool, timesteps: Tensor) -> Iterator[dict[str, Any]]:
        """Inside, the network computes as the call asks for; gives what to record of its attention."""
        with ExitStack() as stack:
            if attention is not None:
                stack.enter_context(switched(self.network, "auto"))
                stack.enter_context(use_attention(attention))
            if hoist:
                stack.enter_context(hoisted(self.network, timesteps))
            yield chosen(self.network) if overrides(self.network) else {}

    def _guidance(self, guidance: Guidance | str | float | None, scale: float | None) -> Guidance:
        if guidance is not None and scale is not None:
            raise ValueError(f"guidance={guidance!r} and guidance_scale={scale!r}: give one of them")
        if guidance is not None:
            return as_guidance(guidance)
        if scale is None:
            scale = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        if not is_number(scale):
            raise ValueError(f"guidance_scale={scale!r} must be a number; give an object or an expression as guidance")
        return as_guidance(scale) if scale > 1 else NoGuidance()

    def _watched(self, way: Way, course: Course, callback: StepEnd | None, bar: Any) -> Sampler:
        """The solver with the callback after each of its steps."""
        times = zip(course.scheduler.timesteps, course.places, strict=True)
        begun = [time for time, place in times if place.stage == "step"]

        def advance(step: Step, x: Tensor, memory: Any, **options: Any) -> tuple[Tensor, Any]:
            if self.pipe._interrupt:
                return x, memory
            x, memory = way.solver.step(step, x, memory, **options)
            bar.update()
            if callback is not None:
                size = step.there.alpha / way.home(step.there.sigma)[0]
                time = begun[step.index] if step.index < len(begun) else None
                changed = callback(self.pipe, step.index, time, {"latents": x / size}) or {}
                x = changed["latents"] * size if "latents" in changed else x
            return x, memory

        return replace(way.solver, step=advance)


def _given(latents: Tensor | None, draw: Draw) -> Tensor:
    if latents is None:
        return draw.first().float()
    if latents.shape != draw.shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}, but this call needs {draw.shape}")
    return latents.to(draw.device).float()


def _check(output_type: str, inputs: Sequence[str]) -> None:
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUTS)}")
    if list(inputs) != ["latents"]:
        raise ValueError(f"callback_on_step_end_tensor_inputs={list(inputs)!r}: only ['latents'] can be had")


__all__ = ["DiffusersOutput", "DiffusersPipeline"]
