"""Which metrics are computed, over which extractor's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genkit_eval.errors import InputError
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import METRICS, Spec
from genkit_eval.presets import find_preset


@dataclass(frozen=True)
class Metrics:
    """Metrics asked for by name, beside the standard ones unless ``standard`` is off.

    A name with a part of the extractor, ``frechet@dinov2``, is the metric over that part's features.
    """

    names: tuple[str, ...] = ()
    standard: bool = True

    def check(self) -> None:
        """InputError for a name that is not registered."""
        for name in self.names:
            metric = name.partition("@")[0]
            if metric not in METRICS:
                raise InputError(
                    "--metric", f"got {name!r}; one of {', '.join(METRICS)} works, or NAME@PART for a part of --extractor"
                )
            if "@" in name and METRICS[metric].source == "pixels":
                raise InputError("--metric", f"got {name!r}; {metric} reads pixels and is the same for every extractor")

    def has(self, name: str) -> bool:
        """Whether the metric of this name is computed."""
        return name in self.names or (self.standard and name in METRICS and METRICS[name].standard)

    def specs(self, extractor: Extractor) -> dict[str, tuple[Spec, Extractor]]:
        """By name as in the results: the metric, and the extractor that it is named after. InputError as :meth:`check`."""
        self.check()
        found = {
            name: (spec, extractor) for name, spec in METRICS.items() if name in self.names or (self.standard and spec.standard)
        }
        for name in self.names:
            metric, _, part = name.partition("@")
            if part and part not in extractor.parts:
                known = f"has the parts {', '.join(extractor.parts)}" if extractor.parts else "is one network"
                raise InputError("--metric", f"got {name!r}; extractor {extractor.name} {known}")
            if part == extractor.part:
                found[metric] = (METRICS[metric], extractor)
            elif part:
                found[name] = (METRICS[metric].over_part(part), extractor.parts[part])
        return found

    def as_dict(self) -> dict[str, object]:
        """The part of an entry that says what was asked for; empty for the standard ones."""
        extra: dict[str, object] = {"extra_metrics": list(self.names)} if self.names else {}
        return extra if self.standard else {**extra, "standard_metrics": False}


def metrics_of(preset: str | None, names: Sequence[str] | None) -> Metrics:
    """Of a preset its own metrics, else the standard ones; and those asked for by name."""
    own = () if preset is None else find_preset(preset).metrics
    return Metrics(tuple(dict.fromkeys([*own, *(names or [])])), standard=preset is None)
