"""Which class image k has: a function of the rule, the seed and k alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from genkit_eval.errors import InputError

LABEL_RULES = {
    "balanced": "class k mod C",
    "random": "blake2b(seed, k) mod C",
    "sorted": "class floor(k C / N) of N images",
    "file": "line k of a file of class indices",
}
TYPED = "balanced, random, sorted or file:PATH"


def label_of(k: int, num_classes: int, rule: str = "balanced", seed: int = 0, classes: Sequence[int] = ()) -> int:
    """Class of image ``k``.

    ``rule`` is "balanced" (default), "random" (independent of samplers, batches and other images), "sorted:N" for N images, or
    "file:..." for the k-th of ``classes``. Raises ValueError for another rule.
    """
    kind, _, more = rule.partition(":")
    if rule == "balanced":
        return k % num_classes
    if rule == "random":
        digest = hashlib.blake2b(f"genkit label {seed} {k}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % num_classes
    if kind == "sorted" and more.isdecimal():
        return k * num_classes // int(more)
    if kind == "file" and k < len(classes):
        return classes[k]
    raise ValueError(f"labels: got {rule!r} for image {k}; {TYPED} works")


def labels_of(indices: range, num_classes: int, rule: str = "balanced", seed: int = 0, classes: Sequence[int] = ()) -> list[int]:
    """Classes of consecutive images."""
    return [label_of(k, num_classes, rule, seed, classes) for k in indices]


def read_labels(text: str, num_samples: int) -> tuple[str, tuple[int, ...]]:
    """The rule as it is recorded, and the classes of a file, from what was typed.

    With "sorted" the number of images belongs to the rule: the class of an image depends on it. A file is named by its hash.
    Raises InputError for another rule, and for a file that is not one whole number a line or too short.
    """
    kind, _, place = text.partition(":")
    if text in ("balanced", "random"):
        return text, ()
    if text == "sorted":
        return f"sorted:{num_samples}", ()
    if kind != "file" or not place:
        raise InputError("--labels", f"got {text!r}; {TYPED} works")
    try:
        content = Path(place).read_bytes()
        classes = tuple(int(line) for line in content.decode().split())
    except OSError as error:
        raise InputError("--labels", f"{place} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise InputError("--labels", f"{place} is not one class index a line ({error})") from None
    if len(classes) < num_samples:
        raise InputError("--labels", f"{place} has {len(classes)} lines for {num_samples} images; one for each works")
    return f"file:{hashlib.sha256(content).hexdigest()}", classes


def check_classes(classes: Sequence[int], num_classes: int) -> None:
    """InputError for classes of a file that the model does not have."""
    wrong = next(((k, c) for k, c in enumerate(classes) if not 0 <= c < num_classes), None)
    if wrong is not None:
        raise InputError("--labels", f"line {wrong[0] + 1} is class {wrong[1]}; the model has 0 to {num_classes - 1}")


def rule_in_words(rule: str) -> str:
    """For the results."""
    kind, _, more = rule.partition(":")
    return LABEL_RULES[kind] + {"sorted": f", N = {more}", "file": f" with SHA-256 {more}"}.get(kind, "")
