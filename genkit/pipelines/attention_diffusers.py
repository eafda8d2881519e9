"""genkit's choice of attention in networks of diffusers: :func:`set_attention`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from genkit import attention
from genkit.attention.choice import check
from genkit.pipelines.attach.attend import attend
from genkit.pipelines.networks import networks

PLAIN = ("AttnProcessor2_0", "AttnProcessor", "XFormersAttnProcessor")  # the same formula, whoever computes it
LINEAR = ("SanaLinear", "SanaMultiscale")  # attention without a softmax
BEFORE = "_genkit_before"


@dataclass
class Reached:
    """How attention layers were switched.

    Attributes:
        dispatcher: through diffusers' own dispatcher.
        processor: by a processor of genkit's in place of diffusers' plain one.
        redirected: by their own processor, whose calls of torch's attention go to genkit's.
        genkit: layers of genkit's own networks.
        skipped: layers that stay as they were, by the class of their processor.
    """

    dispatcher: int = 0
    processor: int = 0
    redirected: int = 0
    genkit: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.dispatcher + self.processor + self.redirected + self.genkit


def set_attention(target: Any, backend: str | None = "auto") -> Reached:
    """Let networks compute attention through :func:`genkit.attention.attention`; None puts back exactly what was.

    ``set_attention(pipe, "flex")``. The backend is what these networks ask for: inside ``use_attention`` another may count.
    diffusers' own ``set_attention_backend`` does nothing in networks of its older kind (DiT, the UNets, PixArt), and where it
    acts it changes the backend of the whole process; this acts in both kinds, and on these networks alone. Processors with
    weights of their own, as an IP-Adapter's, and those that diffusers does not have stay as they are, with a warning.

    Masks that are added to the scores, which is how diffusers hands on a padded text in its older networks, are left to torch.

    Args:
        target: a network, or a pipeline, of diffusers or of genkit.
        backend: a name of :data:`genkit.attention.BACKENDS`, or "auto"; None to undo.

    Raises:
        Unavailable: a ValueError, no such backend, or it cannot be used on this machine.
        ValueError: no network, or none with a layer that can be switched.
    """
    nets = networks(target)
    if backend is not None:
        check(backend, f"backend={backend!r}")
    reached = Reached()
    for net in nets:
        if any(hasattr(layer, "attention_backend") and not hasattr(layer, "processor") for layer in net.modules()):
            attention.set_attention(net, backend)
            reached.genkit += 1
        for layer in net.modules():
            if hasattr(layer, "processor") and hasattr(layer, "set_processor"):
                _restore(layer)
                if backend is not None:
                    _switch(layer, backend, reached)
    if backend is not None and not reached.total:
        found = ", ".join(reached.skipped) or "none that is known"
        names = ", ".join(type(net).__name__ for net in nets)
        raise ValueError(f"in {names} there is no attention that can be switched; the processors are: {found}")
    if reached.skipped:
        listed = ", ".join(f"{count} x {name}" for name, count in reached.skipped.items())
        warnings.warn(f"attention stays as it was in layers with processors genkit does not replace: {listed}", stacklevel=2)
    return reached


@contextmanager
def switched(target: Any, backend: str | None) -> Iterator[None]:
    """:func:`set_attention` for a while; None changes nothing. What was set before is set again afterwards."""
    if backend is None:
        yield
        return
    before: list[Any] = [(layer, layer.attention_backend) for net in networks(target) for layer in net.modules() if _asks(layer)]
    set_attention(target, backend)
    try:
        yield
    finally:
        set_attention(target, None)
        for layer, name in before:
            if hasattr(layer, "processor"):
                _switch(layer, name, Reached())
            else:
                layer.attention_backend = name


def _asks(layer: nn.Module) -> bool:
    return getattr(layer, "attention_backend", None) is not None


def _switch(layer: Any, backend: str, reached: Reached) -> None:
    processor = layer.processor
    name, known = type(processor).__name__, type(processor).__module__.startswith("diffusers.")
    if known and hasattr(processor, "_attention_backend"):
        if not hasattr(processor, BEFORE):  # one processor may serve many layers
            own = processor.__dict__
            setattr(processor, BEFORE, ("_attention_backend" in own, own.get("_attention_backend")))
        processor._attention_backend = _member(backend)
        reached.dispatcher += 1
    elif known and name in PLAIN and not (name == "AttnProcessor" and (layer.upcast_attention or layer.upcast_softmax)):
        layer.processor = Plain(processor)
        reached.processor += 1
    elif known and name.endswith("2_0") and not isinstance(processor, nn.Module) and not name.startswith(LINEAR):
        layer.processor = Redirected(processor)
        reached.redirected += 1
    else:
        if not name.startswith(LINEAR):
            reached.skipped[name] += 1
        return
    layer.attention_backend = backend


def _restore(layer: Any) -> None:
    """What others have put there since stays."""
    layer.__dict__.pop("attention_backend", None)
    processor = layer.processor
    if isinstance(processor, Plain | Redirected):
        layer.processor = processor.before
    elif hasattr(processor, BEFORE):
        own, value = processor.__dict__.pop(BEFORE)
        if str(getattr(processor._attention_backend, "value", "")).startswith("genkit:"):
            processor._attention_backend = value
            if not own:
                del processor._attention_backend


class Plain:
    """Attention of diffusers' ``Attention`` layers, self or cross, by genkit's backends.

    Args:
        before: the processor whose place it takes.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        size = x.shape[2:] if x.ndim == 4 else None
        if size is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        if attention_mask is not None:
            batch, length, _ = source.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(source), attn.to_v(source))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = attend(q, k, v, attention_mask, default=attn.attention_backend).transpose(1, 2).flatten(2).to(q.dtype)
        for layer in attn.to_out:
            out = layer(out)
        if size is not None:
            out = out.transpose(1, 2).unflatten(2, size)
        if attn.residual_connection:
            out = out + hidden_states
        scaled: Tensor = out / attn.rescale_output_factor
        return scaled


class Redirected:
    """Another processor, whose calls of torch's attention go to genkit's.

    Args:
        before: that processor.
    """

    def __init__(self, before: Any) -> None:
        self.before = before
        self.__dict__["__call__"] = before.__call__  # by its signature the layer finds out what to hand on

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(attn.attention_backend):
            return self.before(attn, *args, **kwargs)


class _Redirect(TorchFunctionMode):
    def __init__(self, default: str) -> None:
        super().__init__()
        self.default = default

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}), default=self.default)
        return func(*args, **(kwargs or {}))


@lru_cache
def _member(backend: str) -> Any:
    """A backend of genkit's as one of diffusers' dispatcher, where nothing uses it that does not name it.

    Raises:
        ValueError: this version of diffusers has no such dispatcher.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise ValueError(f"this version of diffusers has no dispatcher of attention that genkit knows ({error})") from error

    # The dispatcher looks backends up by members of an enumeration, which has no way to add one.
    member = str.__new__(AttentionBackendName, f"genkit:{backend}")
    member._name_, member._value_ = f"GENKIT_{backend.upper()}", f"genkit:{backend}"
    AttentionBackendName._value2member_map_[member._value_] = member

    @_AttentionBackendRegistry.register(member)  # type: ignore[untyped-decorator]
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None:
            raise ValueError("context parallelism is not supported by genkit's attention: set_attention(network, None)")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (q.shape[0], k.shape[2]):
            attn_mask = attn_mask[:, None, None]
        return attend(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, default=backend).transpose(1, 2)

    return member


__all__ = ["Reached", "set_attention", "switched"]
