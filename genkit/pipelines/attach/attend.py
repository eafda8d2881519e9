"""genkit's attention under the signature of torch's, for networks that are not genkit's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import handle_torch_function, has_torch_function

from genkit.attention import Causal, Mask, attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    default: str | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` by the backend that :func:`genkit.attention.attention` chooses.

    Modes of torch see it, as they see torch's own. What torch's alone can do it is given: dropout, masks of numbers that are
    added to the scores, and tensors that do not have four axes.

    Args:
        default: what the network asks for.
    """
    if has_torch_function((query, key, value)):
        out: Tensor = handle_torch_function(
            attend, (query, key, value), query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, default=default
        )
        return out
    added = attn_mask is not None and attn_mask.dtype is not torch.bool
    both = is_causal and attn_mask is not None  # what that means is torch's to say
    if added or dropout_p or both or not query.ndim == key.ndim == value.ndim == 4:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask: Mask | Tensor | None = attn_mask
    if is_causal:
        queries, keys = query.shape[-2], key.shape[-2]
        mask = Causal()
        if queries != keys:  # torch's mask begins at the first key, genkit's ends at the last
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    batch = max(query.shape[0], key.shape[0], value.shape[0])
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))
    return attention(query, key, value, mask=mask, scale=scale, default=default)


__all__ = ["attend"]
