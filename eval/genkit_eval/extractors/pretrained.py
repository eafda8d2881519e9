"""What the networks of transformers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit_eval.errors import InputError


def build(model: Any, config: Any, state: Mapping[str, Tensor], path: Path) -> Any:
    """A model of transformers with ``state`` in it, in float32, frozen. InputError when a weight is missing or of another shape.

    ``from_pretrained`` is asked because it knows under which names older files hold the weights.
    """
    with _quiet():
        net, report = model.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report as well
        )
    for what, found in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        names = sorted(key if isinstance(key, str) else key[0] for key in found)
        if names:
            raise InputError("--weights", f"{path} {what} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}")
    return net.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """No table of keys on the terminal: what is wrong is said in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
