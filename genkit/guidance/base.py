"""The guidance protocol: what a step looks like, what a method may ask for, and what it returns."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard

from torch import Tensor

from genkit import noise

Stage = Literal["step", "second", "corrector"]


class StepInfo(NamedTuple):
    """Where one evaluation stands in a run. Immutable; a combinator hands a changed copy down with ``_replace``.

    ``sigma`` is the noise level at which the *step* begins, also in its second evaluation, so that a gate opens or closes
    for whole steps. ``alpha`` and ``s`` are those of the point ``x`` at which the network is evaluated.
    """

    index: int  # type: ignore[assignment]  # 0 .. total - 1 (hides tuple.index)
    total: int
    progress: float  # 0 at the first step, 1 at the last
    stage: Stage
    sigma: float
    sigma_next: float
    alpha: float
    s: float
    x: Tensor  # (B, ...), in the sampler's coordinates
    weight: float | None = None  # replaces the method's own scale when a combinator sets it


class Branch(NamedTuple):
    """One prediction a step needs. Rows where ``mask`` (B,) is False are not evaluated; they hold the cond prediction."""

    name: str
    condition: str = "cond"
    model: str = "main"
    mask: Tensor | None = None


COND = Branch("cond")
UNCOND = Branch("uncond", condition="uncond")


class Result(NamedTuple):
    """The guided clean-image estimate; ``direction``, if given, replaces it in ``n_hat = (x - alpha D) / s``."""

    denoised: Tensor
    direction: Tensor | None = None
    stats: Mapping[str, float] = {}


Predictions = Mapping[str, Tensor]

_CLASSES: dict[str, type[Guidance]] = {}


@dataclass(frozen=True)
class Guidance:
    """Immutable configuration of a guidance method. Subclass it, add fields, and write ``plan`` and ``rule``.

    A subclass is registered by its class name (``parse`` then knows it) unless its name begins with an underscore.
    """

    #: Expressions that make typical objects: shown to users, and put through every law by the tests.
    examples: ClassVar[tuple[str, ...]] = ()
    #: The space in which ``rule`` sees predictions. Matters only for rules that are not affine in them.
    space: ClassVar[noise.Space] = "x0"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in cls.__dict__:  # else @dataclass writes one with the qualified name, which parse does not read
            type.__setattr__(cls, "__repr__", cls.__repr__)
        known = _CLASSES.get(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"a guidance named {cls.__name__!r} exists already in {known.__module__}; give yours another name")
        if not cls.__name__.startswith("_"):
            _CLASSES[cls.__name__] = cls

    def __repr__(self) -> str:
        """The expression that makes this object."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"

    def init(self, batch: int) -> Any:
        """State of a new run over ``batch`` samples; it belongs to the run and is handed back at every call."""
        return None

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        """The predictions this evaluation needs. Pure. What is not planned is not evaluated."""
        raise NotImplementedError

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        """Guided estimate and new state, from predictions in x0 space."""
        if self.space == "x0":
            return self.rule(info, predictions, state)
        a, s, x = info.alpha, info.s, info.x
        native = {name: noise.from_x0(d, x, a, s, self.space) for name, d in predictions.items()}
        result, state = self.rule(info, native, state)
        return result._replace(denoised=noise.to_x0(result.denoised, x, a, s, self.space)), state

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        """The formula, on predictions in the method's native space."""
        raise NotImplementedError

    def weight(self, info: StepInfo) -> float:
        """The guidance scale in force at this evaluation: the override of a combinator, or the method's own ``scale``."""
        own: float = getattr(self, "scale", 1.0)
        return own if info.weight is None else info.weight


def classes() -> dict[str, type[Guidance]]:
    """Every registered class, by name."""
    return dict(_CLASSES)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a real number of Python or NumPy, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(owner: object, name: str, low: float = -math.inf, high: float = math.inf, inside: bool = False) -> None:
    """Raise ValueError unless field ``name`` of ``owner`` is a real number in [low, high], or in (low, high) if ``inside``.

    Never NaN; infinite only where ``low`` is finite and ``high`` is inf. The field becomes a Python float.
    """
    value = getattr(owner, name)
    valid = is_number(value) and low <= value <= high
    if valid and abs(value) > sys.float_info.max:  # infinite, or an integer that no float can hold
        valid = value == math.inf and low > -math.inf
    if not valid or (inside and value in (low, high)):
        bounds = f"a number strictly between {low:g} and {high:g}" if inside else f"a number from {low:g} to {high:g}"
        bounds = bounds if low > -math.inf else "a finite number"
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} must be {bounds}")
    if type(value) is not float:  # CFG(3) and CFG(3.0) are one object, with one repr
        object.__setattr__(owner, name, float(value))


def check_guidance(owner: object, name: str = "inner") -> None:
    """Raise TypeError unless field ``name`` of ``owner`` is a guidance object."""
    value = getattr(owner, name)
    if not isinstance(value, Guidance):
        raise TypeError(f"{type(owner).__name__}: {name}={value!r} must be a guidance, for example CFG(3.0)")


@dataclass(frozen=True)
class _Combinator(Guidance):
    """A guidance around another: by default it changes nothing."""

    inner: Guidance

    def __post_init__(self) -> None:
        check_guidance(self)

    @property
    def scale(self) -> float:
        """The scale of the method inside, before any override."""
        return float(getattr(self.inner, "scale", 1.0))

    def weight(self, info: StepInfo) -> float:
        return self.inner.weight(info)

    def init(self, batch: int) -> Any:
        return self.inner.init(batch)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.inner.plan(info, state)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return self.inner.combine(info, predictions, state)


def signature(cls: type[Guidance]) -> str:
    """``Name(field, field=default, ...)``, for messages and help."""
    parts = [f.name if f.default is f.default_factory else f"{f.name}={f.default!r}" for f in fields(cls)]
    return f"{cls.__name__}({', '.join(parts)})"
