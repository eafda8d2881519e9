"""``compile()`` of every pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

from genkit.models.compiled import compile_regions


class Compiling:
    """A pipeline whose networks can be compiled."""

    def compile(
        self,
        backend: str | Callable[..., Any] | None = "inductor",
        mode: str | None = None,
        freeze: bool | None = None,
        **options: Any,
    ) -> Self:
        """Have ``torch.compile`` make the networks faster; returns the pipeline.

        Diffusion: the network's pass, for each shape of batch. Next token: the step of one token on the cache; what feeds several
        tokens at once (a text, a tree of drafts) runs as it is. Next scale: the blocks, once for all scales. The cache, the
        guidance and attention over the cache stay outside, so that nothing is compiled anew from step to step. Images and tokens
        are those of the pipeline without it, up to rounding. The first call takes long (seconds to minutes); that of another
        batch size compiles again. Branches whose layers are weakened (PAG, SLG) run without. A second call of compile() with
        the same arguments does nothing.

        Args:
            backend: of ``torch.compile``; None undoes it.
            mode: of ``torch.compile``; None is "reduce-overhead" (CUDA graphs) on CUDA, else its default.
            freeze: take weights for constants and keep a second copy of them for each batch size, laid out for it; None: on the
                CPU, for diffusion and next token. Weights that are changed later are not seen: compile(None) and compile() again.
            options: more of ``torch.compile``'s arguments.

        Raises:
            ValueError: a model that is no network of torch.
            RuntimeError: when images are made: a network that cannot be compiled.
        """
        for network in self._compilable():
            compile_regions(network, backend, mode, freeze, **options)
        return self

    def _compilable(self) -> Iterable[Any]:
        """The networks that predict."""
        raise NotImplementedError


__all__ = ["Compiling"]
