"""What decides the images of a run, and the guard against mixing two runs in one folder."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

#: Images of each guidance whose pixels are stored: enough for the pictures of a report. Of the others, features are.
KEEP_IMAGES = 256
NOT_DECIDING = ("classes", "preset", "keep_images")


@dataclass(frozen=True)
class RunConfig:
    """Everything but the guidance that a stored block depends on.

    The sample count is not part of it: a finished run grows when it is asked for more. Nor are ``classes``, the labels of a file,
    which ``labels`` names by its hash, ``preset``, what the results say of one, and ``keep_images``, how many images are stored.
    """

    model: str
    model_sha256: str
    sampler: str
    steps: int
    seed: int
    labels: str
    block_size: int
    extractor: str
    extractor_sha256: str
    resize: str
    uint8_rule: str
    genkit: str
    classes: tuple[int, ...] = ()
    preset: dict[str, Any] = field(default_factory=dict, compare=False)
    keep_images: int = KEEP_IMAGES

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in NOT_DECIDING}

    def hash(self, guidance: str) -> str:
        """SHA-256 over this configuration and the guidance's ``repr``."""
        text = json.dumps({**self.as_dict(), "guidance": guidance}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Phrases such as ``steps is 18 there and 10 here``, empty when the two agree."""
    keys = dict.fromkeys([*stored, *wanted])
    return [f"{key} is {stored.get(key)} there and {wanted.get(key)} here" for key in keys if stored.get(key) != wanted.get(key)]


def slug(guidance: str) -> str:
    """A short folder name for a guidance's ``repr``; the hash keeps two long ones apart."""
    words = re.sub(r"[^a-z0-9.]+", "-", guidance.lower()).strip("-.")[:40].strip("-.")
    return f"{words}-{hashlib.sha256(guidance.encode()).hexdigest()[:6]}"
