"""Attention with capped scores (Gemma 2) that does not save them, registered with transformers.

    out = softmax(cap * tanh(q k^T * scaling / cap) + mask) v

It is computed for one block of queries after the other and recomputed in backward, so that the (T, T) scores of all
heads never exist. Of transformers' own implementations eager saves all scores, sdpa cannot cap, and flex_attention
needs a compiler. Like sdpa it takes boolean masks, and None for plain causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "mora_ds_capped"
"""Its name in transformers, once `use_capped_attention` has been called."""

QUERIES = 256
"""Queries in a block: scores of (B, H, QUERIES, T) exist at a time."""


def use_capped_attention(model: Any) -> bool:
    """Replace the eager attention of a model that caps its scores. Returns whether it did."""
    config = model.config.get_text_config()
    if not caps_scores(config) or config._attn_implementation != "eager":
        return False
    if NAME not in ALL_ATTENTION_FUNCTIONS:  # else keep what `ulysses` has wrapped around it
        ALL_ATTENTION_FUNCTIONS.register(NAME, capped_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    return True


def caps_scores(config: Any) -> bool:
    """Whether a model's text config asks for capped scores."""
    return bool(getattr(config, "attn_logit_softcapping", None))


def capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (B, H, T, D), key and value (B, H_kv, S, D), mask (B, 1, T, S) ->
    (B, T, H, D). Sliding windows and documents are in the mask."""
    del others
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    drop = dropout if module.training else 0.0
    parts = []
    for start in range(0, query.shape[2], QUERIES):
        part = query[:, :, start : start + QUERIES]
        seen = _seen(attention_mask, query, key, start, part.shape[2])
        parts.append(checkpoint(_attend, part, key, value, seen, scaling, softcap, drop, use_reentrant=False))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _seen(mask: Tensor | None, query: Tensor, key: Tensor, start: int, length: int) -> Tensor:
    """(B or 1, 1, length, S) true where a query of the block sees a key."""
    if mask is not None:
        return mask[:, :, start : start + length]
    queries = torch.arange(start, start + length, device=query.device) + key.shape[2] - query.shape[2]
    return (torch.arange(key.shape[2], device=query.device) <= queries[:, None])[None, None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, softcap: float | None, drop: float
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, drop) @ value
