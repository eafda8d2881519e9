"""What the pipelines of autoregressive models share: conditions, batches, guidance, partial images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from genkit.denoiser import Condition, TraceLevel
from genkit.guidance import Guidance, Trace
from genkit.pipelines.compiling import Compiling
from genkit.pipelines.images import to_pil, to_uint8
from genkit.pipelines.output import Output
from genkit.pipelines.request import as_guidance, batches, class_index, paired
from genkit.pipelines.speculative import joined
from genkit.pipelines.text import Features, TextEncoder
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.flow_scale import GuidedFlow
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.samplers.autoregressive.speculative import Report


class Partial:
    """Images while they are made; they are decoded when they are first asked for, which costs a pass of the decoder.

    Attributes:
        index, total: the step just made, and their number.
        seeds: of the images of this batch.
        tokens: (B, N), -1 where there is none yet; or (B, L') of the scales so far; None for continuous latents.
    """

    def __init__(self, index: int, total: int, seeds: list[int], tokens: Tensor | None, decode: Callable[[], Tensor]) -> None:
        self.index, self.total, self.seeds, self.tokens, self._decode = index, total, seeds, tokens, decode

    @cached_property
    @torch.no_grad()
    def latents(self) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1]."""
        return self._decode()

    @property
    def images(self) -> list[Image]:
        """PIL images."""
        return to_pil(to_uint8(self.latents))


Callback = Callable[[Partial], None]


class Request(NamedTuple):
    """What is asked for, one entry for each image; ``features`` of texts given as such."""

    seeds: list[int]
    labels: list[int]
    prompts: list[str]
    features: Features | None


class Drawn(NamedTuple):
    """Tokens (B, N), if there are any, images (B, 3, H, W), and how drafted tokens fared."""

    tokens: Tensor | None
    images: Tensor
    report: Report | None = None


@dataclass
class Autoregressive(Compiling):
    """What these pipelines share: conditions, batches, guidance, the decoder.

    Attributes:
        models: networks by name; ``"main"``, and any that a guidance asks for, such as ``"weak"``.
        tokenizer: the image tokenizer the network was trained with; for continuous latents, an autoencoder.
        name: for errors and reports.
        found: what the loader recognised, in words.
        class_names: of the classes 0 .. C - 1, or empty where they only have numbers.
        text_encoder: from prompts to what the network is conditioned on, for models that take text.
        filters: what draws are restricted to where a call says nothing else.
        fingerprint: SHA-256 over the files of all models.
        sampler: the one way in which the model draws, by name; None for models that take a sampler.
    """

    sampler: ClassVar[str | None] = None

    models: dict[str, Any]
    tokenizer: Any
    name: str = "this model"
    found: str = ""
    class_names: tuple[str, ...] = ()
    text_encoder: TextEncoder | None = None
    filters: Filters | Sequence[Filters] = Filters()  # noqa: RUF009 (immutable)
    fingerprint: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def network(self) -> Any:
        return self.models["main"]

    @property
    def num_classes(self) -> int | None:
        """None for models that take text."""
        if getattr(self.network.config, "text_dim", None) is not None:
            return None
        count: int = self.network.config.num_classes
        return count

    @property
    def steps(self) -> int:
        """Steps of an image: its tokens, or its scales."""
        return len(self.network.config.patch_nums)

    @cached_property
    @torch.no_grad()
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width), as the decoder makes them."""
        channels, height, width = self._blank().shape[1:]
        return channels, height, width

    def _blank(self) -> Tensor:
        """The image (1, 3, H, W) of tokens that are all 0."""
        length = getattr(self.network, "tokens", None) or self.network.length
        blank: Tensor = self.tokenizer.decode(torch.zeros(1, length, dtype=torch.long, device=self.device))
        return blank

    def to(self, device: str | torch.device) -> Self:
        """Move the networks; returns the pipeline."""
        self.device = torch.device(device)
        for module in (*self.models.values(), self.tokenizer, self.text_encoder, getattr(self, "drafter", None)):
            if hasattr(module, "to"):
                module.to(self.device)
        return self

    def _compilable(self) -> list[Any]:
        return list(self.models.values())

    def class_index(self, value: int | str) -> int:
        """Index of a class given by index or name. Raises ValueError naming what would work."""
        return class_index(value, self.num_classes or 0, self.class_names, self.name)

    def request(self, classes: Any, prompt: Any, seeds: Any) -> Request:
        """Conditions and seeds in pairs. Raises ValueError for a class where the model takes a prompt, or the other way round."""
        if self.num_classes is not None:
            if prompt is not None or classes is None:
                what = f"prompt={_short(prompt)}" if prompt is not None else "classes=None"
                raise ValueError(f"{what}: {self.name} takes classes, 0 to {self.num_classes - 1}: classes=[...]")
            labels, numbers = paired(classes, seeds, self.class_index)
            return Request(numbers, labels, [], None)
        if classes is not None or prompt is None:
            what = f"classes={_short(classes)}" if classes is not None else "prompt=None"
            raise ValueError(f"{what}: {self.name} takes text: prompt='...'")
        if isinstance(prompt, Tensor | Mapping):
            return self._with_features(prompt, seeds)
        prompts, numbers = paired(prompt, seeds, _text, "prompt", "prompt")
        if self.text_encoder is None:
            raise ValueError(
                f"prompt={_short(prompt)}: {self.name} has no text encoder; load it with text_encoder=..., or give features"
            )
        return Request(numbers, [], prompts, None)

    def _with_features(self, prompt: Features, seeds: Any) -> Request:
        given = dict(prompt) if isinstance(prompt, Mapping) else {"text": prompt}
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        config = self.network.config
        tokens = getattr(config, "text_tokens", None)
        wanted = ("B", config.text_dim) if tokens is None else ("B", tokens, config.text_dim)
        if "text" not in given or given["text"].shape[1:] != wanted[1:] or len({len(t) for t in tensors}) != 1:
            found = {key: tuple(value.shape) for key, value in given.items()}
            raise ValueError(f"prompt has features {found}; {self.name} needs 'text' of shape ({', '.join(map(str, wanted))})")
        rows, numbers = paired(range(len(given["text"])), seeds, int, "prompt", "prompt")
        return Request(numbers, [], [], {key: value[torch.tensor(rows)] for key, value in given.items()})

    def _conditions(self, request: Request, part: slice) -> dict[str, Condition]:
        if self.num_classes is not None:
            cond = torch.tensor(request.labels[part], device=self.device)
            return {"cond": cond, "uncond": self.network.null(len(cond))}
        if request.features is not None:
            given: Any = request.features
            features: Any = {key: value[part] for key, value in given.items()}
        else:
            assert self.text_encoder is not None  # asked for by request()
            features = self.text_encoder(request.prompts[part])
        dtype = next(self.network.parameters()).dtype
        features = features if isinstance(features, Mapping) else {"text": features}
        text = features["text"].to(self.device, dtype)
        if not hasattr(self.network.config, "text_tokens"):
            return {"cond": text, "uncond": self.network.null(len(text))}
        mask = features.get("text_mask")
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        mask = mask.bool().to(self.device)
        return {"cond": {"text": text, "text_mask": mask}, "uncond": self.network.null(len(text), mask)}

    def _generate(
        self,
        request: Request,
        guidance: Guidance | str | float | None,
        batch_size: int | None,
        progress: bool,
        callback: Callback | None,
        trace: TraceLevel,
        draw: Callable[[Any, slice, Callable[..., None]], Drawn],
        run_of: type[GuidedLogits | GuidedFlow] = GuidedLogits,
    ) -> Output:
        """Batch by batch: ``draw(run, part, tick)`` with a new run of the guidance, and ``tick`` to be called after each step."""
        rule, parts = as_guidance(guidance), batches(len(request.seeds), batch_size)
        drawn, nfe, calls, table = list[Drawn](), list[int](), 0, Trace()
        with tqdm(total=len(parts) * self.steps, disable=not progress, unit="step", leave=False) as bar, torch.no_grad():
            for number, part in enumerate(parts):
                seeds, before = request.seeds[part], number * self.steps
                run = run_of(self.models, rule, self._conditions(request, part), len(seeds), trace=trace, seeds=seeds)

                def tick(
                    index: int, found: Tensor | None, decode: Callable[[], Tensor], seeds: list[int] = seeds, before: int = before
                ) -> None:
                    bar.update(before + index + 1 - bar.n)
                    if callback is not None:
                        callback(Partial(index, self.steps, seeds, found, decode))

                drawn.append(draw(run, part, tick))
                nfe += run.ledger.nfe
                calls += run.ledger.calls
                table.extend(run.trace)
        tokens, reports = [d.tokens for d in drawn if d.tokens is not None], [d.report for d in drawn if d.report is not None]
        made = (request.seeds, request.labels, request.prompts, torch.cat(tokens) if tokens else None)
        return Output(torch.cat([d.images for d in drawn]), nfe, calls, table, *made, joined(reports))

    def _filters(
        self, given: Filters | Sequence[Filters] | None, sizes: tuple[int, ...], **changes: float | None
    ) -> Filters | Sequence[Filters]:
        """The filters of a call. Raises ValueError for both kinds at once, and for a top_k that the vocabulary does not have."""
        asked = {key: value for key, value in changes.items() if value is not None}
        if given is not None and asked:
            raise ValueError(f"filters and {', '.join(asked)} are given; put all into one, such as Filters(temperature=1.0)")
        chosen = self.filters if given is None else given
        if asked:
            default = chosen if isinstance(chosen, Filters) else chosen[0]
            chosen = replace(default, **asked)  # type: ignore[arg-type]  # checked by Filters
        several = [(chosen, max(sizes))] if isinstance(chosen, Filters) else list(zip(chosen, sizes, strict=False))
        for one, size in several:
            if not isinstance(one, Filters):
                raise ValueError(f"filters={given!r}: use Filters(...), or one for each part of a token")
            if one.top_k > size and (given is not None or "top_k" in asked):  # the pipeline's own may be made for any size
                raise ValueError(f"top_k={one.top_k} is larger than the vocabulary of {size}; use 1 to {size}, or 0 for all")
        return chosen


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"prompt contains {value!r}: give texts")
    return value


def _short(value: Any) -> str:
    return f"features of {len(value)}" if isinstance(value, Tensor | Mapping) else repr(value)[:60]


__all__ = ["Autoregressive", "Callback", "Drawn", "Partial", "Request"]
