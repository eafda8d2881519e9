"""Which class image k has: a function of the rule, the seed and k alone."""

from __future__ import annotations

import hashlib

LABEL_RULES = {
    "balanced": "class k mod C",
    "random": "blake2b(seed, k) mod C",
}


def label_of(k: int, num_classes: int, rule: str = "balanced", seed: int = 0) -> int:
    """Class of image ``k``; ``rule`` is "balanced" (default) or "random" (independent of samplers, batches and other images).

    Raises ValueError for another rule.
    """
    if rule == "balanced":
        return k % num_classes
    if rule == "random":
        digest = hashlib.blake2b(f"genkit label {seed} {k}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % num_classes
    raise ValueError(f"labels: got {rule!r}; one of {', '.join(LABEL_RULES)} works")


def labels_of(indices: range, num_classes: int, rule: str = "balanced", seed: int = 0) -> list[int]:
    """Classes of consecutive images."""
    return [label_of(k, num_classes, rule, seed) for k in indices]
