"""Pipelines of models that draw an image token by token, or scale by scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.denoiser import Condition, Guided, TraceLevel
from genkit.guidance import Guidance
from genkit.pipelines.autoregressive_base import Autoregressive, Callback, Drawn, Partial
from genkit.pipelines.output import Output
from genkit.pipelines.text import Features
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.flow_scale import GuidedFlow, next_scale_flow
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.samplers.autoregressive.next_scale import VAR_FILTERS, next_scale
from genkit.samplers.autoregressive.next_token import generate
from genkit.samplers.diffusion import Sampler


@dataclass
class TokenPipeline(Autoregressive):
    """Images token by token: ``pipe(classes=[207, 360], seeds=[0, 1], guidance=4.0, top_k=2000)``; LlamaGen, Open-MAGVIT2."""

    @property
    def steps(self) -> int:
        count: int = self.network.tokens
        return count

    def _begin(self, guidance: Guidance, conditions: Mapping[str, Condition], seeds: list[int], trace: TraceLevel) -> Guided:
        return GuidedLogits(self.models, guidance, conditions, len(seeds), trace=trace, seeds=seeds)

    def __call__(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        seeds: int | Sequence[int] | None = None,
        guidance: Guidance | str | float | None = None,
        *,
        prompt: str | Sequence[str] | Features | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        filters: Filters | Sequence[Filters] | None = None,
        scales: Sequence[float] | None = None,
        given: Tensor | None = None,
        batch_size: int | None = None,
        trace: TraceLevel = "basic",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Output:
        """Generate one image per class or prompt. Image k depends on its condition, its seed and the guidance, not on its batch.

        Args:
            classes: index or name, or a list of them; for models of classes.
            seeds: one integer per image; None is 0, 1, 2, ... A single condition goes with every seed, and the other way round.
            guidance: object, expression, a number w (short for CFG(w)), or None for none.
            prompt: one text or several; for models of text. Features in place of them are used as they are.
            temperature, top_k, top_p: in place of those of the pipeline's own ``filters``.
            filters: all of these in one, or one for each part of a token.
            scales: guidance scales for each part of a token, in place of the guidance's own (Open-MAGVIT2).
            given: (B, N) tokens that are to stand where they are, -1 where one is to be drawn.
            batch_size: at most this many images at a time; None is all at once.
            trace: ``"none"``, ``"basic"``, or ``"full"`` (also the branches' cosine and the update's norm).
            progress: show a progress bar on stderr.
            callback: called with a :class:`Partial` after every token.

        Raises:
            ValueError: an unknown class, a class for a model of text or the other way round, seeds that do not match, a guidance
                that logits cannot have, top_k beyond the vocabulary.
        """
        request = self.request(classes, prompt, seeds)
        kept = self._filters(filters, self.network.parts, temperature=temperature, top_k=top_k, top_p=top_p)
        given = _checked(given, len(request.seeds), self.steps)

        def draw(run: GuidedLogits, part: slice, tick: Callable[..., None]) -> Drawn:
            def seen(index: int, tokens: Tensor) -> None:
                so_far = tokens.clone()
                tick(index, so_far, lambda: self.tokenizer.decode(so_far.clamp_min(0)))

            some = None if given is None else given[part]
            tokens = generate(run, request.seeds[part], kept, scales=scales, given=some, callback=seen)
            return Drawn(tokens, self.tokenizer.decode(tokens))

        return self._generate(request, guidance, batch_size, progress, callback, trace, draw)


@dataclass
class ScalePipeline(Autoregressive):
    """Images scale by scale: ``pipe(classes=[207], guidance=var_guidance(1.5))``; VAR and VAR-CLIP.

    Without filters it draws as VAR does: top_k=900, top_p=0.96.
    """

    filters: Filters | Sequence[Filters] = VAR_FILTERS

    def _begin(self, guidance: Guidance, conditions: Mapping[str, Condition], seeds: list[int], trace: TraceLevel) -> Guided:
        return GuidedLogits(self.models, guidance, conditions, len(seeds), trace=trace, seeds=seeds)

    def __call__(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        seeds: int | Sequence[int] | None = None,
        guidance: Guidance | str | float | None = None,
        *,
        prompt: str | Sequence[str] | Features | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        filters: Filters | None = None,
        smooth: bool = False,
        given: Tensor | None = None,
        batch_size: int | None = None,
        trace: TraceLevel = "basic",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Output:
        """Generate one image per class or prompt. Image k depends on its condition, its seed and the guidance, not on its batch.

        Args:
            smooth: mixtures of codes in place of codes, see :func:`genkit.samplers.autoregressive.next_scale.next_scale`.
            given: (B, L) tokens of all scales that are to stand where they are, -1 where one is to be drawn.
            callback: called with a :class:`Partial` after every scale.

        The other arguments, and what is raised, are as for :class:`TokenPipeline`.
        """
        request = self.request(classes, prompt, seeds)
        size = self.network.config.vocabulary
        kept = self._filters(filters, (size,), temperature=temperature, top_k=top_k, top_p=top_p)
        if not isinstance(kept, Filters):
            raise ValueError(f"filters={filters!r}: use one Filters(...)")
        given = _checked(given, len(request.seeds), self.network.length)

        def draw(run: GuidedLogits, part: slice, tick: Callable[..., None]) -> Drawn:
            def seen(index: int, tokens: Tensor, f_hat: Tensor) -> None:
                tick(index, tokens, lambda: self.tokenizer.decode_features(f_hat))

            some = None if given is None else given[part]
            quantizer = self.tokenizer.quantize
            drawn = next_scale(run, quantizer, request.seeds[part], kept, smooth=smooth, given=some, callback=seen)
            return Drawn(drawn.indices, self.tokenizer.decode_features(drawn.f_hat))

        return self._generate(request, guidance, batch_size, progress, callback, trace, draw)


@dataclass
class FlowScalePipeline(Autoregressive):
    """Images scale by scale, each drawn by a flow: ``pipe(classes=[207], guidance=flowar_guidance(4.3, 0.9))``; FlowAR.

    ``tokenizer`` is an autoencoder with ``decode_features``: from the network's latents (B, C, P, P) to images.
    """

    def _begin(self, guidance: Guidance, conditions: Mapping[str, Condition], seeds: list[int], trace: TraceLevel) -> Guided:
        return GuidedFlow(self.models, guidance, conditions, len(seeds), trace, seeds)

    def __call__(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        seeds: int | Sequence[int] | None = None,
        guidance: Guidance | str | float | None = None,
        *,
        prompt: None = None,
        steps: int = 25,
        sampler: str | Sampler = "flow_euler",
        batch_size: int | None = None,
        trace: TraceLevel = "basic",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Output:
        """Generate one image per class. Image k depends on its class, its seed, the guidance and the sampler, not on its batch.

        Args:
            steps: of the flow at each scale.
            sampler: of the flow, name or expression.
            callback: called with a :class:`Partial` after every scale.

        The other arguments, and what is raised, are as for :class:`TokenPipeline`; there are no logits to filter.
        """
        request, side = self.request(classes, prompt, seeds), self.network.config.patch_nums[-1]

        def draw(run: GuidedFlow, part: slice, tick: Callable[..., None]) -> Drawn:
            def seen(index: int, latent: Tensor) -> None:
                tick(index, None, lambda: self.tokenizer.decode_features(self._enlarged(latent, side)))

            latent = next_scale_flow(run, request.seeds[part], steps=steps, sampler=sampler, callback=seen)
            return Drawn(None, self.tokenizer.decode_features(latent))

        return self._generate(request, guidance, batch_size, progress, callback, trace, draw)

    def _enlarged(self, latent: Tensor, side: int) -> Tensor:
        like = next(self.network.parameters())
        return torch.nn.functional.interpolate(latent.to(like), size=(side, side), mode="bicubic")


def _checked(given: Tensor | None, count: int, length: int) -> Tensor | None:
    if given is not None and given.shape != (count, length):
        raise ValueError(f"given of shape {tuple(given.shape)} must be ({count}, {length}): one row for each image")
    return given


__all__ = ["Autoregressive", "FlowScalePipeline", "Partial", "ScalePipeline", "TokenPipeline"]
