"""What is the same at every step, computed once: :func:`hoist`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from genkit.models.compiled import Compiled
from genkit.pipelines.attach.call import unwrapped
from genkit.pipelines.attach.replace import replaced
from genkit.pipelines.hoist.memo import Count, Memo, constant
from genkit.pipelines.hoist.modulation import Modulations, norms
from genkit.pipelines.networks import networks

Times = Sequence[float] | Tensor


@dataclass
class Hoisted:
    """What :func:`hoist` saved.

    Attributes:
        text: calls of projections of the text: how many were computed, how many answered with an earlier output.
        modulation: rows of AdaLN modulation of a block: how many are in the tables, how many were taken from them.
    """

    text: Count = field(default_factory=Count)
    modulation: Count = field(default_factory=Count)


@contextmanager
def hoist(target: Any, timesteps: Times | None = None, memory: int = 2**28) -> Iterator[Hoisted]:
    """Inside, networks compute once what is the same at every step; afterwards they are as they were.

    Keys and values of cross-attention, and the projections of the text before them, are kept for the conditions that came last
    (Stable Diffusion 1, 2, XL, PixArt, Sana, Wan; the conditions of FlowAR's flows): bit for bit. A condition that is written
    to, or another one, is computed anew; so are changed weights. In a DiT of diffusers, whose blocks all embed time and label by
    themselves, AdaLN's modulations are computed for many steps in one product per block: to rounding.

    ``with hoist(pipe), attach(pipe, "CFG(4.0)"): ...``. It acts in the thread that entered it, under ``torch.no_grad``;
    with gradients, and for tensors of ``torch.inference_mode``, everything is computed each time. On a GPU the times and labels
    of each pass of a DiT are read back, once.

    Writes that torch does not count are not seen: those through ``.data``, as fusing a LoRA, belong outside.

    Args:
        target: a network, or a pipeline of diffusers or of genkit.
        timesteps: of the run, in its order, for modulations; default: those of the pipeline's scheduler. At other times each
            is computed when it comes.
        memory: bytes that the modulations of a network may take; with less, for fewer steps at a time.

    Raises:
        ValueError: no network, one that is compiled, or one in which nothing is the same at every step.
    """
    found, nets = Hoisted(), networks(target)
    with ExitStack() as stack:
        entered = 0
        for net in nets:
            if any(unwrapped(m) is not m or compiled(m) for m in net.modules()):
                raise ValueError(
                    f"{type(unwrapped(net)).__name__} is compiled, which fixes its layers: hoist before, or not at all"
                )
            for layer in constant(net):
                stack.enter_context(replaced(layer, "forward", Memo(layer, found.text)))
                entered += 1
            if blocks := norms(net):
                modulations = Modulations(blocks, _planned(target, timesteps), memory, found.modulation)
                stack.enter_context(modulations.installed())
                entered += 1
        if not entered:
            names = ", ".join(type(net).__name__ for net in nets)
            raise ValueError(f"in {names} nothing that genkit knows of is the same at every step: leave hoist out")
        yield found


def compiled(module: nn.Module) -> bool:
    """Whether its calls go through ``torch.compile``: by ``module.compile()``, or by ``compile()`` of a pipeline of genkit."""
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(module.__dict__.get("forward"), Compiled)


def _planned(target: Any, timesteps: Times | None) -> Callable[[], Any]:
    def planned() -> Any:
        if timesteps is not None:
            return timesteps
        scheduler = None if isinstance(target, nn.Module) else getattr(target, "scheduler", None)
        set_up = getattr(scheduler, "num_inference_steps", None) is not None
        return scheduler.timesteps if set_up else ()  # type: ignore[union-attr]

    return planned


__all__ = ["Hoisted", "hoist"]
