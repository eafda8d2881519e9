"""The guidance protocol: what a step looks like, what a method may ask for, and what it returns."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeGuard

from torch import Tensor

from genkit import noise

Stage = Literal["step", "second", "corrector"]

Need = Literal["direction", "corrector", "perturb", "noise", "gradient", "prepare", "refine"]
"""What a method needs of its host. ``direction``: the solver uses ``Result.direction``. ``corrector``: it has corrector stages.
``perturb``: the network can be weakened in chosen layers. ``noise``: random numbers of the run. ``gradient``: derivatives
through the network. ``prepare``, ``refine``: the hook of that name is called, and may evaluate the network itself."""


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


class Perturbation(NamedTuple):
    """A way to weaken a network in some of its layers, for the branch a guidance pushes away from.

    ``identity``: self-attention returns its values (PAG). ``blur``: its queries are blurred over the image with a Gaussian of
    ``sigma`` token widths, inf being their mean (SEG). ``skip``: the block passes its input on (SLG).
    """

    kind: Literal["identity", "blur", "skip"]
    layers: tuple[str, ...] = ()  # names of the network's layers, or of groups of them; () is the model's own choice
    sigma: float = math.inf


class Branch(NamedTuple):
    """One prediction a step needs. Rows where ``mask`` (B,) is False are not evaluated; they hold the cond prediction."""

    name: str
    condition: str = "cond"
    model: str = "main"
    mask: Tensor | None = None
    perturbation: Perturbation | None = None
    transform: Transform | None = None  # applied to the condition anew at every evaluation

    @property
    def network(self) -> tuple[str, Perturbation | None]:
        """What is evaluated: the model, and how it is weakened. Rows of one network share a forward pass."""
        return self.model, self.perturbation


COND = Branch("cond")
UNCOND = Branch("uncond", condition="uncond")


class Result(NamedTuple):
    """The guided clean-image estimate; ``direction``, if given, replaces it in ``n_hat = (x - alpha D) / s``.

    ``score`` is a gradient with respect to x, of a classifier's log-probability for example. A sampler that knows the variance
    of its step may add variance * score to the step's mean; all others see it through :meth:`absorbed`.
    """

    denoised: Tensor
    direction: Tensor | None = None
    stats: Mapping[str, float] = {}
    score: Tensor | None = None

    def absorbed(self, info: StepInfo) -> Result:
        """The score moved into the estimate: ``D + (s^2 / alpha) score``; at alpha = 0 (pure noise) it is dropped."""
        if self.score is None:
            return self
        if info.alpha == 0:
            return self._replace(score=None)
        shift = (info.s**2 / info.alpha) * self.score
        moved = None if self.direction is None else self.direction + shift
        return Result(self.denoised + shift, moved, self.stats)


Predictions = Mapping[str, Tensor]


class Host(Protocol):
    """What a run offers to ``prepare``, ``refine`` and condition transforms: :class:`genkit.denoiser.Guided` is one."""

    @property
    def models(self) -> Mapping[str, Any]:
        """Denoisers, classifiers and distances, by name."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The condition of every name a branch may ask for."""

    def evaluate(self, info: StepInfo, branches: tuple[Branch, ...]) -> dict[str, Tensor]:
        """Predictions at ``info.x`` and its noise level, in x0 space: booked in the ledger, and differentiable."""

    def noise(self, like: Tensor, info: StepInfo, draw: int = 0) -> Tensor:
        """Unit Gaussian noise (B, ...): a function of each sample's seed, the evaluation and ``draw`` alone."""

    def model(self, name: str) -> Any:
        """One of ``models``. Raises ValueError that names those there are."""

    def embed(self, condition: Any, model: str = "main") -> Any:
        """The condition as real numbers: class labels become their embeddings."""


Transform = Callable[[Any, StepInfo, Host], Any]
"""``transform(condition, info, run) -> condition``, over the whole batch; hashable, like the guidance it belongs to."""

_CLASSES: dict[str, type[Guidance]] = {}


@dataclass(frozen=True)
class Guidance:
    """Immutable configuration of a guidance method. Subclass it, add fields, and write ``plan`` and ``rule``.

    A subclass is registered by its class name (``parse`` then knows it) unless the name begins with "_" or ``abstract``.
    """

    #: Expressions that make typical objects: shown to users, and put through every law by the tests.
    examples: ClassVar[tuple[str, ...]] = ()
    #: The space in which ``rule`` sees predictions. Matters only for rules that are not affine in them.
    space: ClassVar[noise.Space] = "x0"
    #: Whether ``rule`` is affine in the predictions, and so gives the same image in every space.
    affine: ClassVar[bool] = True
    #: Whether it means something on logits of tokens, less their mean. None: as ``affine``, ``space`` and ``requires`` tell.
    logits: ClassVar[bool | None] = None
    #: What the method itself asks of its host beside ``plan`` and ``combine``; a host that lacks it refuses the method.
    requires: ClassVar[frozenset[Need]] = frozenset()

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if "__repr__" not in cls.__dict__:  # else @dataclass writes one with the qualified name, which parse does not read
            type.__setattr__(cls, "__repr__", cls.__repr__)
        known = _CLASSES.get(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"a guidance named {cls.__name__!r} exists already in {known.__module__}; give yours another name")
        if not abstract and not cls.__name__.startswith("_"):
            _CLASSES[cls.__name__] = cls

    def __repr__(self) -> str:
        """The expression that makes this object."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in arguments(type(self)))})"

    @property
    def parts(self) -> tuple[Guidance, ...]:
        """The guidances among its fields, and in tuples of them."""
        values = [getattr(self, f.name) for f in fields(self)]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        return tuple(v for v in flat if isinstance(v, Guidance))

    @property
    def needs(self) -> frozenset[Need]:
        """What it requires, with all its parts."""
        return self.requires.union(*(part.needs for part in self.parts))

    def init(self, batch: int) -> Any:
        """State of a new run over ``batch`` samples; it belongs to the run and is handed back at every call."""
        return None

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        """New state, before ``plan``. Called if the method requires ``"prepare"``."""
        return state

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
        back = noise.to_x0(result.denoised, x, a, s, self.space)
        direction = None if result.direction is None else noise.to_x0(result.direction, x, a, s, self.space)
        return result._replace(denoised=back, direction=direction), state

    def rule(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        """The formula, on predictions in the method's native space."""
        raise NotImplementedError

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        """A better estimate and new state, after ``combine``. Called if the method requires ``"refine"``."""
        return result, state

    def to_diffusers(self, scheduler: Any = None) -> Any:
        """This guidance as a guider of diffusers' modular pipelines; see ``genkit.to_diffusers``. Needs diffusers."""
        # A convenience for users: this floor itself knows nothing of what it looks up here.
        return importlib.import_module("genkit.pipelines.to_diffusers").to_diffusers(self, scheduler)

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


def check_count(owner: object, name: str, low: int) -> None:
    """Raise ValueError unless field ``name`` of ``owner`` is an integer from ``low`` on. The field becomes a Python int."""
    value = getattr(owner, name)
    if not is_number(value) or value != value // 1 or not low <= value < sys.maxsize:
        raise ValueError(f"{type(owner).__name__}: {name}={value!r} must be an integer from {low} on")
    object.__setattr__(owner, name, int(value))


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

    def prepare(self, info: StepInfo, run: Host, state: Any) -> Any:
        return self.inner.prepare(info, run, state)

    def plan(self, info: StepInfo, state: Any) -> tuple[Branch, ...]:
        return self.inner.plan(info, state)

    def combine(self, info: StepInfo, predictions: Predictions, state: Any) -> tuple[Result, Any]:
        return self.inner.combine(info, predictions, state)

    def refine(self, info: StepInfo, result: Result, run: Host, state: Any) -> tuple[Result, Any]:
        return self.inner.refine(info, result, run, state)


def arguments(cls: type[Guidance]) -> list[Field[Any]]:
    """Its fields in the order of a call: keyword-only ones last, also where one of them hides an attribute of the class."""
    return sorted(fields(cls), key=lambda f: f.kw_only is True)


def signature(cls: type[Guidance]) -> str:
    """``Name(field, field=default, ...)``, for messages and help."""
    parts = [f.name if f.default is f.default_factory else f"{f.name}={f.default!r}" for f in arguments(cls)]
    return f"{cls.__name__}({', '.join(parts)})"
