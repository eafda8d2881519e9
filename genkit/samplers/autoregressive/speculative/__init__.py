"""Speculative decoding: a drafter proposes tokens, and the target accepts several of them in one pass."""

from genkit.samplers.autoregressive.speculative.acceptance import Acceptance, Exact, Lantern, Verdict, verify, verify_greedy
from genkit.samplers.autoregressive.speculative.decode import Report, Speculation, speculate
from genkit.samplers.autoregressive.speculative.drafters import CopyDrafter, Drafter, EagleDrafter, ModelDrafter, Proposer, Seen
from genkit.samplers.autoregressive.speculative.stepwise import TreeLogits
from genkit.samplers.autoregressive.speculative.tree import DynamicTree, Shape, StaticTree, TokenTree

__all__ = [
    "Acceptance",
    "CopyDrafter",
    "Drafter",
    "DynamicTree",
    "EagleDrafter",
    "Exact",
    "Lantern",
    "ModelDrafter",
    "Proposer",
    "Report",
    "Seen",
    "Shape",
    "Speculation",
    "StaticTree",
    "TokenTree",
    "TreeLogits",
    "Verdict",
    "speculate",
    "verify",
    "verify_greedy",
]
