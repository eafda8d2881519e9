"""Text encoders of transformers, as autoregressive models were trained with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

Features = Tensor | Mapping[str, Tensor]
"""Embeddings (B, d); or ``{"text": (B, T, d), "text_mask": (B, T)}``, padded on the left, or the first of them alone."""
TextEncoder = Callable[[list[str]], Features]
"""From prompts to features."""


class _Encoder:
    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    def to(self, device: str | torch.device) -> Self:
        """Move the network; returns the encoder."""
        self.model.to(device)
        return self

    def _tokens(self, prompts: list[str], length: int) -> Any:
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompts, **options).to(self.model.device)


class T5Features(_Encoder):
    """Features of each token of a T5 encoder, for LlamaGen t2i (flan-t5-xl): padding moved to the left, and zero.

    Args:
        model: a ``T5EncoderModel``.
        tokenizer: its tokenizer.
        length: tokens; longer prompts are cut.
    """

    def __init__(self, model: Any, tokenizer: Any, length: int = 120) -> None:
        super().__init__(model, tokenizer)
        self.length = length

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], length: int = 120) -> Self:
        """From a folder or a hub id of transformers."""
        from transformers import AutoTokenizer, T5EncoderModel  # takes seconds to import, and is optional

        return cls(T5EncoderModel.from_pretrained(path), AutoTokenizer.from_pretrained(path), length)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text (B, length, d) and text_mask (B, length) of prompts."""
        tokens = self._tokens([prompt.lower().strip() for prompt in prompts], self.length)
        mask = tokens["attention_mask"].bool()
        features = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        order = mask.int().argsort(1, stable=True)  # padding first, the rest as it stands
        mask = mask.gather(1, order)
        text = features.gather(1, order[..., None].expand_as(features)) * mask[..., None]
        return {"text": text, "text_mask": mask}


class CLIPText(_Encoder):
    """The normalised text embedding of CLIP, for VAR-CLIP (clip-vit-large-patch14).

    Args:
        model: a ``CLIPTextModelWithProjection``.
        tokenizer: its tokenizer.
    """

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """From a folder or a hub id of transformers."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        return cls(CLIPTextModelWithProjection.from_pretrained(path), AutoTokenizer.from_pretrained(path))

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, d) of norm 1."""
        tokens = self._tokens(prompts, self.model.config.max_position_embeddings)
        found = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds
        out: Tensor = found / found.norm(dim=-1, keepdim=True)
        return out


__all__ = ["CLIPText", "Features", "T5Features", "TextEncoder"]
