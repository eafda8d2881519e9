"""Attention: one call, with masks as data, and a choice of backends. A new backend is one file in ``backends/``."""

from genkit.attention.base import BACKENDS, AttentionBackend, Request, Unavailable, register_backend
from genkit.attention.call import attention
from genkit.attention.choice import chosen, overrides, report, set_attention, use_attention
from genkit.attention.masks import And, BlockCausal, Causal, Dense, Mask, Padding, Prefix, Sliding, Tree

__all__ = [
    "BACKENDS",
    "And",
    "AttentionBackend",
    "BlockCausal",
    "Causal",
    "Dense",
    "Mask",
    "Padding",
    "Prefix",
    "Request",
    "Sliding",
    "Tree",
    "Unavailable",
    "attention",
    "chosen",
    "overrides",
    "register_backend",
    "report",
    "set_attention",
    "use_attention",
]
