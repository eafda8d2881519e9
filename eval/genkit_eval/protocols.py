"""What genkit-eval asks of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Pipeline(Protocol):
    """Makes one image per class and seed; image k must depend on its own class and seed alone."""

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def __call__(
        self,
        classes: Sequence[int | str],
        seeds: Sequence[int],
        guidance: Any,
        *,
        trace: Any,
        **options: Any,
    ) -> Any:
        """Generate; the result has ``pixels`` uint8 (B, 3, H, W), ``nfe`` (B ints), ``calls`` and ``trace.rows`` (dicts).

        The options are ``sampler`` and ``steps``. A pipeline that draws in one way alone names that in an attribute ``sampler``
        and its steps in ``steps``; it is given the options of that way. ``usual`` are a sampler and its steps for those who ask
        for none. One that rounds to 8 bits by another rule than genkit
        says so in ``uint8_rule``; with ``latents`` (B, 3, H, W) in [-1, 1] in the result, other rules can be asked for.
        """


def uint8_rule(pipe: Pipeline) -> str:
    """The formula of the rule by which the pipeline makes its 8-bit pixels."""
    from genkit.pipelines.images import UINT8_RULE

    return str(getattr(pipe, "uint8_rule", UINT8_RULE))
