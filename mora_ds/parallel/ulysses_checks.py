"""Checks from a model's config whether it supports --sequence_parallel_size, before any
text is read.

Later `train/preflight.py` compares the model's logits of split and full sequences.
"""

from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.models.attention import why_dense
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import check_heads

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest position (modeling_rope_utils.py)."""


def check_config(config: Any, size: int, attn_implementation: str | None) -> None:
    """Raise `UserError` if the config shows that sequences cannot be split over `size`
    ranks. `attn_implementation`: the user's setting; None for document attention."""
    if size == 1:
        return
    text = config.get_text_config()
    heads, kv_heads = _heads(text)
    check_heads(size, heads, kv_heads)
    if reason := why_dense(config, attn_implementation):
        raise UserError(
            f"{SEQUENCE}: only document attention can be split, and this model cannot use it, because {reason}"
        )
    parameters = getattr(text, "rope_parameters", None) or {}
    # In some models each layer type has separate settings
    for settings in (parameters, *parameters.values()):
        kind = settings.get("rope_type") if isinstance(settings, dict) else None
        if kind in _LENGTH_DEPENDENT:
            raise UserError(
                f"{SEQUENCE}: rotary embeddings of rope_type {kind} depend on the longest position of the full sequence"
            )


def describe(config: Any, size: int, seq_len: int) -> str:
    """A log line about the work of each rank."""
    heads, _ = _heads(config.get_text_config())
    return (
        f"sequence parallel: every sequence is split over {size} ranks; each computes {seq_len // size} of {seq_len} "
        f"tokens, and in attention {heads // size} of {heads} heads over all tokens"
    )


def _heads(config: Any) -> tuple[int, int]:
    """(attention heads, key-value heads) of a text config."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(
            f"{SEQUENCE}: this model's config has no number of attention heads to split over ranks"
        )
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
