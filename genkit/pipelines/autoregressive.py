"""Pipelines of models that draw an image token by token, or scale by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.denoiser import TraceLevel
from genkit.guidance import Guidance
from genkit.models.eagle import EagleHead
from genkit.pipelines.autoregressive_base import Autoregressive, Callback, Drawn, Partial
from genkit.pipelines.output import Output
from genkit.pipelines.speculative import Plan, Speculative, as_speculative, plan_for, raw
from genkit.pipelines.text import Features
from genkit.samplers.autoregressive.filters import Filters
from genkit.samplers.autoregressive.flow_scale import GuidedFlow, next_scale_flow
from genkit.samplers.autoregressive.guided import GuidedLogits
from genkit.samplers.autoregressive.next_scale import VAR_FILTERS, next_scale
from genkit.samplers.autoregressive.next_token import generate
from genkit.samplers.autoregressive.speculative import Acceptance, Drafter, TreeLogits, speculate
from genkit.samplers.diffusion import Sampler
from genkit.tokenizers.quantizers import Quantizer


@dataclass
class TokenPipeline(Autoregressive):
    """Images token by token: ``pipe(classes=[207, 360], seeds=[0, 1], guidance=4.0, top_k=2000)``; LlamaGen, Open-MAGVIT2.

    Attributes:
        drafter: for ``speculative=True``: the EAGLE head that was loaded with the network, or any drafter.
    """

    drafter: EagleHead | Drafter | None = None
    sampler: ClassVar[str | None] = "next_token"

    @property
    def steps(self) -> int:
        count: int = self.network.tokens
        return count

    @cached_property
    def _codes(self) -> Quantizer:
        return raw(self.tokenizer.quantize)

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
        speculative: bool | float | str | Acceptance | Speculative | None = None,
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
            speculative: several tokens in one pass, of those that a drafter proposes under the same guidance. True: exactly, with
                the pipeline's own drafter. A rule, such as ``Lantern(k=100, delta=0.1)``, or its delta: faster, and not quite the
                model's law. Or a :class:`Speculative`, which also says which drafter. Any of them as an expression.
            batch_size: at most this many images at a time; None is all at once.
            trace: ``"none"``, ``"basic"``, or ``"full"`` (also the branches' cosine and the update's norm).
            progress: show a progress bar on stderr.
            callback: called with a :class:`Partial` after every token; with drafted ones, when a pass has settled some of them:
                ``index`` then counts those of the row that has fewest.

        Raises:
            ValueError: an unknown class, a class for a model of text or the other way round, seeds that do not match, a guidance
                that logits cannot have, top_k beyond the vocabulary. With ``speculative``: no drafter or one of another network,
                ``given``, ``scales``, several filters, or a guidance that remembers earlier steps.
        """
        request = self.request(classes, prompt, seeds)
        kept = self._filters(filters, self.network.parts, temperature=temperature, top_k=top_k, top_p=top_p)
        given = _checked(given, len(request.seeds), self.steps)
        plan = self._plan(speculative, given=given, scales=scales, filters=kept if isinstance(kept, Sequence) else None)

        def draw(run: Any, part: slice, tick: Callable[..., None]) -> Drawn:
            def seen(index: int, tokens: Tensor) -> None:
                so_far = tokens.clone()
                tick(index, so_far, lambda: self.tokenizer.decode(so_far.clamp_min(0)))

            seeds, report = request.seeds[part], None
            if plan is None:
                some = None if given is None else given[part]
                tokens = generate(run, seeds, kept, scales=scales, given=some, callback=seen)
            else:
                assert isinstance(kept, Filters)  # seen to by _plan
                tokens, report = speculate(
                    run, plan.drafter, seeds, kept, plan.rule, callback=lambda tokens, counts: seen(int(counts.min()) - 1, tokens)
                )
            return Drawn(tokens, self.tokenizer.decode(tokens), report)

        kind = GuidedLogits if plan is None else TreeLogits
        return self._generate(request, guidance, batch_size, progress, callback, trace, draw, kind)

    def _plan(self, speculative: Any, **options: Any) -> Plan | None:
        asked = as_speculative(speculative)
        if asked is None:
            return None
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"speculative and {name} are given, which do not go together; leave one of them out")
        return plan_for(asked, self.network, self.drafter, self._codes, self.name)


@dataclass
class ScalePipeline(Autoregressive):
    """Images scale by scale: ``pipe(classes=[207], guidance=var_guidance(1.5))``; VAR and VAR-CLIP.

    Without filters it draws as VAR does: top_k=900, top_p=0.96.
    """

    filters: Filters | Sequence[Filters] = VAR_FILTERS
    sampler: ClassVar[str | None] = "next_scale"

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

    def _blank(self) -> Tensor:
        config = self.network.config
        side = config.patch_nums[-1]
        blank: Tensor = self.tokenizer.decode_features(torch.zeros(1, config.channels, side, side, device=self.device))
        return blank

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

        return self._generate(request, guidance, batch_size, progress, callback, trace, draw, GuidedFlow)

    def _enlarged(self, latent: Tensor, side: int) -> Tensor:
        like = next(self.network.parameters())
        return torch.nn.functional.interpolate(latent.to(like), size=(side, side), mode="bicubic")


def _checked(given: Tensor | None, count: int, length: int) -> Tensor | None:
    if given is not None and given.shape != (count, length):
        raise ValueError(f"given of shape {tuple(given.shape)} must be ({count}, {length}): one row for each image")
    return given


__all__ = ["Autoregressive", "FlowScalePipeline", "Partial", "ScalePipeline", "TokenPipeline"]
