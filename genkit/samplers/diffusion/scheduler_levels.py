"""Where a diffusers scheduler stands: (alpha, s) of the network's input, and the space of the network's output."""

from __future__ import annotations

import math
from typing import Any, Literal

from genkit.noise import Space

State = Literal["discrete", "vp", "ve", "flow"]

# How a scheduler keeps its state. discrete: x of the vp path, levels from alphas_cumprod[t]. vp, ve: from sigmas[step_index];
# a ve scheduler divides by sqrt(1 + sigma^2) in scale_model_input, so that the network sees vp either way. flow: sigmas are t.
NAMES: dict[State, str] = {
    "discrete": "DDIM DDIMParallel DDPM DDPMParallel PNDM LCM TCD CogVideoXDDIM CogVideoXDPM",
    "vp": "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver",
    "ve": "EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete",
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM",
}
STATES: dict[str, State] = {name: state for state, names in NAMES.items() for name in names.split()}
REFUSED = {
    **dict.fromkeys(
        ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
        "its second stage is at an interpolated level that is not in scheduler.sigmas, so x0 there is not exact; "
        "use HeunDiscreteScheduler or DPMSolverMultistepScheduler",
    ),
    **dict.fromkeys(
        ("EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative"),
        "it applies c_skip and c_out to the raw output of the network; wrap the network in genkit.denoiser.EDMDenoiser and use "
        "a sampler of genkit",
    ),
}
SPACE: dict[str, Space] = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


def is_a(scheduler: Any, *names: str) -> bool:
    """Whether the class of the scheduler, or one it derives from, is one of ``names`` with "Scheduler" behind."""
    return any(cls.__name__.removesuffix("Scheduler") in names for cls in type(scheduler).__mro__)


def state_of(scheduler: Any) -> State:
    """How the scheduler keeps its state: one of the four values of ``State``. Raises ValueError for one that cannot be used."""
    for cls in type(scheduler).__mro__:
        name = cls.__name__.removesuffix("Scheduler")
        if name in REFUSED:
            raise ValueError(f"scheduler={type(scheduler).__name__} cannot be used: {REFUSED[name]}")
        if name in STATES:
            return "flow" if scheduler.config.get("use_flow_sigmas") else STATES[name]
    raise ValueError(
        f"scheduler={type(scheduler).__name__} is not known to genkit; use one of {', '.join(f'{n}Scheduler' for n in STATES)}"
    )


def prediction_space(scheduler: Any) -> Space:
    """The space of the output the scheduler expects of its network: ``"eps"``, ``"v"``, ``"flow"`` or ``"x0"``.

    Raises ValueError for a prediction_type it does not know, and for schedulers :func:`state_of` refuses.
    """
    kind = scheduler.config.get("prediction_type") or ("flow_prediction" if state_of(scheduler) == "flow" else "epsilon")
    if kind not in SPACE:
        raise ValueError(f"scheduler.config.prediction_type={kind!r}: genkit knows {', '.join(SPACE)}")
    return SPACE[kind]


def levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """(alpha, s) of the network's next input ``x = alpha x0 + s n``, after ``scheduler.scale_model_input``.

    Those for which x0 by :func:`genkit.noise.to_x0` is the scheduler's own. ``ve`` and ``vp`` schedulers:
    ``(1, sigma) / sqrt(1 + sigma^2)``; flow: ``(1 - sigma, sigma)``; others: ``(sqrt(abar_t), sqrt(1 - abar_t))``.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.
        timestep: an entry of ``scheduler.timesteps``. Where the scheduler counts its steps (``step_index``), the count decides.

    Raises:
        ValueError: a scheduler of another kind (with the reason), or a timestep that is not in its list.
    """
    state = state_of(scheduler)
    if state == "discrete":
        abar = float(scheduler.alphas_cumprod[int(timestep)])
        return math.sqrt(abar), math.sqrt(1 - abar)
    sigma = float(scheduler.sigmas[step_index(scheduler, timestep)])
    if state == "flow":
        return 1 - sigma, sigma
    alpha = 1 / math.hypot(1, sigma)
    return alpha, sigma * alpha


def step_index(scheduler: Any, timestep: Any) -> int:
    """Index into ``scheduler.sigmas`` of its next step: its own count, before the first step what it would begin with."""
    for known in (scheduler.step_index, scheduler.begin_index):
        if known is not None:
            return int(known)
    listed = scheduler.timesteps
    if not (listed == timestep).any():
        raise ValueError(f"timestep={float(timestep):g} is not in scheduler.timesteps, which begin {listed[:3].tolist()}")
    return int(scheduler.index_for_timestep(timestep))


__all__ = ["is_a", "levels", "prediction_space", "state_of", "step_index"]
