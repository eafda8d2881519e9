"""A guidance of genkit as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from genkit import noise
from genkit.denoiser import Ledger
from genkit.guidance.base import COND, Branch, Guidance, StepInfo
from genkit.guidance.none import NoGuidance
from genkit.pipelines.course import Course
from genkit.pipelines.diffusion import as_guidance
from genkit.pipelines.raw import in_any_space
from genkit.samplers.diffusion.scheduler_levels import state_of

SLOTS = {"cond": 0, "uncond": 1, "negative": 1}  # places in the (cond, uncond) pairs that a pipeline hands to its guider


def to_diffusers(guidance: Guidance | str | float, scheduler: Any = None) -> GenkitGuider:
    """The guidance as a guider: ``pipeline.update_components(guider=to_diffusers("APG(4.0)", pipeline.scheduler))``.

    Branches that a step does not plan are not evaluated. CFG, and what schedules and combines it, works on the raw predictions.
    Every other rule sees clean-image estimates: made with the scheduler's levels and the network's input, which the guider
    reads in a hook while the pipeline calls the network.

    Args:
        guidance: an object, an expression, or a number (CFG of that scale: 1 is no guidance, as in diffusers' own guider).
        scheduler: the object that the pipeline steps with. Not needed by CFG, nor for schedules and gates that count steps.

    Raises:
        ValueError: the guidance needs the scheduler and none is given, or a scheduler that genkit cannot read, or what a guider
            does not have: gradients, a second model, weakened layers, fresh noise, or a say in the solver's step.
    """
    return GenkitGuider(guidance, scheduler)


class GenkitGuider(BaseGuidance):  # type: ignore[misc]  # diffusers has no types
    """The guider that :func:`to_diffusers` makes. Its saved configuration is the expression of its guidance.

    It holds the state of one run; the next one begins where the count of steps does not go on. ``ledger`` counts its evaluations.
    A pipeline with two networks may use one guider for both, and then keeps its state across the switch.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  # the base class asks for a list

    def __init__(self, guidance: Guidance | str | float, scheduler: Any = None, enabled: bool = True) -> None:
        super().__init__(enabled=enabled)
        self.guidance = as_guidance(guidance)
        self.register_to_config(guidance=repr(self.guidance), enabled=enabled)
        self.scheduler = scheduler
        self.raw = in_any_space(self.guidance)
        if self.guidance.needs:
            needs = ", ".join(sorted(self.guidance.needs))
            raise ValueError(f"{self.guidance!r} needs {needs}, which a guider does not have; use genkit's DiffusersPipeline")
        if scheduler is not None:
            state_of(scheduler)  # refuses those that cannot be read
        elif not self.raw:
            raise ValueError(_no_scheduler(self.guidance, "clean-image estimates"))
        self.ledger, self._state, self._course = Ledger(0), self.guidance.init(1), cast(Course | None, None)
        self._first, self._last = 0, -1
        self._planned: tuple[Branch, ...] = ()
        self._x: Any = None
        self._hook: Any = None
        if scheduler is None:
            self._plan_of(self._counted(0, 1))

    def new(self, **changes: Any) -> Any:
        """A guider with the same guidance and scheduler, or changed ones."""
        return super().new(**{"scheduler": self.scheduler, **changes})

    @property
    def num_conditions(self) -> int:
        """The most predictions a step may ask for.

        Pipelines read it between steps and between runs, to decide whether to encode a negative prompt: it must not change.
        """
        return 2 if self._enabled and not isinstance(self.guidance, NoGuidance) else 1

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction being made is the conditional one."""
        return bool(self._planned[self._count_prepared - 1].condition == "cond")

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The inputs of each planned branch. Values are (cond, uncond), or tensors that both share."""
        return [self._prepare_batch(data, slot, name) for slot, name in self._plan(data.values())]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, from names of fields of the block state."""
        values = [
            tuple(getattr(data, part, None) for part in name) if isinstance(name, tuple) else getattr(data, name, None)
            for name in input_fields.values()
        ]
        return [self._prepare_batch_from_block_state(input_fields, data, slot, name) for slot, name in self._plan(values)]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Watch for the network's input, if the rule needs clean-image estimates."""
        super().prepare_models(denoiser)
        self.cleanup_models(denoiser)  # of a call that ended in an error
        if not self.raw:
            self._hook = denoiser.register_forward_pre_hook(self._remember, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """The guided prediction, in the space and dtype of those in ``data`` (``noise_pred`` of each planned branch)."""
        raw: dict[str, Tensor] = {b.name: d.noise_pred for b, d in zip(self._planned, data, strict=True)}
        for branch in self._planned:  # the pipeline evaluates the whole batch: rows that were not asked for are put back
            if branch.mask is not None:
                keep = branch.mask.to(raw["cond"].device).reshape(-1, *[1] * (raw["cond"].ndim - 1))
                raw[branch.name] = torch.where(keep, raw[branch.name], raw["cond"])
        self.ledger.count(len(data))
        self.ledger.calls += len(data)
        return GuiderOutput(pred=self._combine(raw), pred_cond=raw.get("cond"), pred_uncond=raw.get("uncond"))

    def _plan(self, values: Iterable[Any]) -> list[tuple[int, str]]:
        if not self._enabled:
            self._planned = (COND,)
            return [(SLOTS["cond"], "pred_cond")]
        values = list(values)
        batch = next(len(part) for value in values for part in _pair(value) if part is not None)
        if self._step != self._last + 1 or self._step == 0 or batch != self.ledger.batch:
            self._state, self.ledger, self._first = self.guidance.init(batch), Ledger(batch), self._step
            self._course = None if self.scheduler is None else Course(self.scheduler, (1.0, 0.0), self._timestep, None)
        self._last = self._step
        self._info = self._counted(self._step, self._num_inference_steps) if self._course is None else self._placed(self._course)
        # A step that needs no prediction needs the network's input all the same, and only a call shows it.
        self._planned = self._plan_of(self._info) or (COND,)
        for branch in self._planned:
            _check(self.guidance, branch, values)
        return [(SLOTS[branch.condition], f"pred_{branch.name}") for branch in self._planned]

    def _plan_of(self, info: StepInfo) -> tuple[Branch, ...]:
        try:
            return self.guidance.plan(info, self._state)
        except TypeError as error:  # a comparison with the level None
            if self.scheduler is None:
                raise ValueError(_no_scheduler(self.guidance, "the noise level")) from error
            raise

    def _counted(self, step: int, total: int) -> StepInfo:
        """The step as far as it is known without a scheduler: with None for all levels."""
        unknown = cast(Any, None)
        return StepInfo(step, total, step / (total - 1) if total > 1 else 0.0, "step", *[unknown] * 5)

    def _placed(self, course: Course) -> StepInfo:
        """The step as the scheduler's tables have it."""
        k = self._step - self._first
        at = course.first + k
        if k >= len(course.places) or course.timesteps[at] != float(self._timestep):
            raise ValueError(
                f"timestep {float(self._timestep):g} is not what this guider's scheduler comes to in step {self._step}; "
                "give to_diffusers the scheduler object that the pipeline uses"
            )
        info, before = course.places[k].info(cast(Any, None)), self._first  # steps of another guider, for a first network
        index, total = info.index + before, info.total + before
        placed: StepInfo = info._replace(index=index, total=total, progress=index / (total - 1) if total > 1 else 0.0)
        return placed

    def _combine(self, raw: dict[str, Tensor]) -> Tensor:
        first = next(iter(raw.values()))
        if not self._enabled:
            return first
        if self.raw:
            result, self._state = self.guidance.combine(self._info, raw, self._state)
            return result.denoised
        assert self._course is not None
        x, (a, s), space = self._input(first), self._info[6:8], self._course.space
        info = self._info._replace(x=x)
        estimates = {name: noise.to_x0(value.float(), x, a, s, space) for name, value in raw.items()}
        result, self._state = self.guidance.combine(info, estimates, self._state)
        return noise.from_x0(result.absorbed(info).denoised, x, a, s, space).to(first.dtype)

    def _remember(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))

    def _input(self, like: Tensor) -> Tensor:
        x = self._x
        if not isinstance(x, Tensor) or x.shape != like.shape:
            found = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"{self.guidance!r} needs clean-image estimates, but this network's input is {found}, not the noisy image alone "
                f"{tuple(like.shape)}; use CFG or what combines it here"
            )
        return x.float()


def _pair(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _no_scheduler(guidance: Guidance, what: str) -> str:
    return f"scheduler=None, but {guidance!r} needs {what}: to_diffusers(guidance, scheduler=pipeline.scheduler)"


def _check(guidance: Guidance, branch: Branch, values: list[Any]) -> None:
    """Raise ValueError unless a guider can have this branch evaluated."""
    if branch.model != "main" or branch.perturbation or branch.transform or branch.condition not in SLOTS:
        what = f"the model {branch.model!r}" if branch.model != "main" else f"the branch {branch.name!r}"
        raise ValueError(f"{guidance!r} asks for {what}, which a guider cannot evaluate; use genkit's DiffusersPipeline")
    pairs = [value for value in values if isinstance(value, tuple) and value[0] is not None]
    if branch.condition != "cond" and not any(len(value) > 1 and value[1] is not None for value in pairs):
        raise ValueError(
            f"{guidance!r} asks for the {branch.name!r} branch, but the pipeline hands its guider no unconditional inputs: "
            "pass negative_prompt=''"
        )


__all__ = ["GenkitGuider", "to_diffusers"]
