"""How far images of the built-in models move with the backend of attention and the dtype; see genkit.attention.deviation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.attention import BACKENDS, AttentionBackend, Mask, Unavailable, register_backend, use_attention
from genkit.attention.choice import reason
from genkit.attention.deviation import deviation
from genkit.denoiser import EDMDenoiser, Guided
from genkit.guidance import CFG
from genkit.models.var import VAR
from genkit.pipelines.loading import load
from genkit.random import Gaussian
from genkit.samplers.diffusion import find_sampler, sample, start

CAST = "genkit-cast"


class Setting(NamedTuple):
    """How a network computes.

    Attributes:
        dtype: of the network; with ``autocast``, of the operations that autocast lowers.
        backend: of its attention.
        attention: the dtype that attention alone is computed in; None for the network's.
    """

    dtype: torch.dtype
    backend: str
    autocast: bool = False
    attention: torch.dtype | None = None

    @property
    def name(self) -> str:
        words = str(self.dtype).removeprefix("torch.") + (" autocast" if self.autocast else "")
        return words + (f", attention in {str(self.attention).removeprefix('torch.')}" if self.attention else "")

    def line(self) -> dict[str, str]:
        """What of a line of the table says which setting it is."""
        return {"setting": self.name, "backend": self.backend}


EXACT = Setting(torch.float64, "reference")


def settings(backends: Sequence[str] | None = None) -> list[Setting]:
    """Float32 with these backends (None: torch's kernels), half precision in attention alone, and by autocast, with sdpa."""
    names = backends or [n for n in BACKENDS if n.startswith("sdpa") and reason(n) is None]
    half = [torch.bfloat16, torch.float16]
    return [
        *(Setting(torch.float32, name) for name in names),
        *(Setting(torch.float32, "sdpa", attention=dtype) for dtype in half),
        *(Setting(dtype, "sdpa", autocast=True) for dtype in half),
    ]


class _Cast(AttentionBackend):
    """Another backend in another dtype."""

    exact = False
    name = CAST

    def __init__(self, backend: str, dtype: torch.dtype) -> None:
        self.backend, self.dtype = BACKENDS[backend], dtype

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
        return self.backend(q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), mask, scale).to(q.dtype)


@contextmanager
def computing(setting: Setting, device: torch.device) -> Iterator[None]:
    """Inside, attention is that of the setting, and autocast is on if the setting says so."""
    lowered = torch.autocast(device.type, setting.dtype) if setting.autocast else nullcontext()
    if setting.attention:
        register_backend(_Cast(setting.backend, setting.attention))
    try:
        with use_attention(CAST if setting.attention else setting.backend), lowered:
            yield
    finally:
        BACKENDS.pop(CAST, None)


def _dtype(setting: Setting) -> torch.dtype:
    """Of the weights."""
    return torch.float32 if setting.autocast else setting.dtype


class _Network(nn.Module):
    """A network in another dtype, under a denoiser that hands it float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.network(x.to(self.dtype), c_noise.to(self.dtype), label)
        return out.to(self.dtype)


@torch.no_grad()
def diffusion_course(setting: Setting, images: int, steps: int, device: torch.device) -> list[Tensor]:
    """Estimates of the clean images after each step of ``builtin/cifar10`` with CFG(3), and the images; the solver in float64."""
    pipe = load("builtin/cifar10", device=device)
    main: Any = pipe.models["main"]
    models = {"main": EDMDenoiser(_Network(main.network, _dtype(setting)), main.sigma_data)}
    solver, seeds = find_sampler("dpmpp_2m"), list(range(images))
    labels = torch.arange(images, device=device) % pipe.num_classes
    run = Guided(models, CFG(3.0), {"cond": labels, "uncond": torch.full_like(labels, pipe.num_classes)}, images, "none", seeds)
    path = solver.path or main.path
    sigmas = pipe._grid(solver, steps, None)
    noise = Gaussian(seeds, stream=0)(torch.empty(images, *pipe.image_shape, device=device)).double()
    course: list[Tensor] = []
    with computing(setting, device):
        end = sample(run, start(noise, sigmas, path), sigmas, solver, path, None, lambda _, r: course.append(r.denoised.cpu()))
    return [*course, end.cpu()]


def diffusion_deviation(
    found: Sequence[Setting], *, images: int = 8, steps: int = 12, device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """How far images of ``builtin/cifar10``, in [-1, 1], are from those of a float64 network on the same seeds.

    Returns:
        For each setting ``steps``, the largest difference of a pixel of the estimates after each step, the deviation of the
        images at the end (``largest``, ``rms``, ``bias``, ``wasserstein``) and ``changed``, the share of 8-bit values that
        differ.
    """
    where = torch.device(device)
    exact = diffusion_course(EXACT, images, steps, where)
    lines = []
    for setting in found:
        try:
            course = diffusion_course(setting, images, steps, where)
        except Unavailable:
            continue
        along = [deviation(a, b).largest for a, b in zip(course[:-1], exact[:-1], strict=True)]
        end, changed = deviation(course[-1], exact[-1]), (_bytes(course[-1]) != _bytes(exact[-1])).double().mean()
        lines.append({"model": "builtin/cifar10", **setting.line(), "steps": along, **vars(end), "changed": float(changed)})
    return lines


def _bytes(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round()


class Tokens(NamedTuple):
    """Drawn tokens (B, N), and logits (B, N, V) of given ones."""

    drawn: Tensor
    logits: Tensor


@torch.no_grad()
def draw_tokens(model: str, setting: Setting, images: int, device: torch.device, given: Tensor | None = None) -> Tokens:
    """Tokens of a built-in autoregressive model with CFG(2), and the logits of ``given`` tokens (None: those drawn)."""
    pipe: Any = load(model, device=device)
    network = pipe.network.to(_dtype(setting))
    labels = torch.arange(images, device=device) % 10
    with computing(setting, device):
        drawn = pipe(labels.tolist(), seeds=list(range(images)), guidance=CFG(2.0)).tokens
        tokens = drawn if given is None else given.to(device)
        if isinstance(network, VAR):
            codes = pipe.tokenizer.quantize.next_inputs(tokens)
            inputs = F.pad(codes, (0, 0, network.first, 0)).to(_dtype(setting))
        else:
            inputs = F.pad(tokens[:, :-1], (network.prefix, 0))
        logits = network(inputs, labels).logits
    return Tokens(drawn.cpu(), logits[:, -tokens.shape[1] :].cpu())


def token_deviation(
    model: str, found: Sequence[Setting], *, images: int = 8, device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """How tokens and logits of ``builtin/cifar10-next-scale`` or ``-next-token`` differ from those of a float64 network.

    Returns:
        For each setting the deviation of the logits of the same tokens, ``scale``, the standard deviation of those logits, and of
        images drawn anew on the same seeds the share of tokens that are ``equal``, and of images that are ``identical``.
    """
    where = torch.device(device)
    exact = draw_tokens(model, EXACT, images, where)
    lines = []
    for setting in found:
        try:
            own = draw_tokens(model, setting, images, where, exact.drawn)
        except Unavailable:
            continue
        same = own.drawn == exact.drawn
        line = {"model": model, **setting.line(), **vars(deviation(own.logits, exact.logits))}
        shares = {"equal": float(same.double().mean()), "identical": float(same.all(1).double().mean())}
        lines.append({**line, "scale": float(exact.logits.std()), **shares})
    return lines


def trajectory_deviation(
    backends: Sequence[str] | None = None, *, device: str | torch.device = "cpu", quick: bool = False
) -> list[dict[str, Any]]:
    """Lines of :func:`diffusion_deviation` and :func:`token_deviation`, for all built-in models and :func:`settings`.

    Args:
        backends: for float32; None is torch's kernels. One that cannot do a network's calls has no line for it.
        device: where the networks run.
        quick: two images and five steps in place of eight and twelve.
    """
    found, images = settings(backends), 2 if quick else 8
    lines = diffusion_deviation(found, images=images, steps=5 if quick else 12, device=device)
    for model in ("builtin/cifar10-next-scale", "builtin/cifar10-next-token"):
        lines += token_deviation(model, found, images=images, device=device)
    return lines
