"""Which models --sequence_parallel_size serves, from a model's config, before any text
is read.

`train/preflight.py` then compares a split row of the model itself to the complete row.
"""

from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.models.attention import why_dense
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import check_heads

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest position (modeling_rope_utils.py)."""


def check_config(config: Any, size: int, attn_implementation: str | None) -> None:
    """Raises `UserError` for a model whose config shows that its rows cannot be split
    over `size` processes. `attn_implementation`: what was asked for; None for attention
    by documents."""
    if size == 1:
        return
    text = config.get_text_config()
    heads, kv_heads = _heads(text)
    check_heads(size, heads, kv_heads)
    if reason := why_dense(config, attn_implementation):
        raise UserError(
            f"{SEQUENCE}: rows are split where attention is by documents, which it is not, because {reason}"
        )
    parameters = getattr(text, "rope_parameters", None) or {}
    # In some models each kind of layer has settings of its own
    for settings in (parameters, *parameters.values()):
        kind = settings.get("rope_type") if isinstance(settings, dict) else None
        if kind in _LENGTH_DEPENDENT:
            raise UserError(
                f"{SEQUENCE}: rotary embeddings of rope_type {kind} depend on the longest position of a complete row"
            )


def describe(config: Any, size: int, seq_len: int) -> str:
    """One line for the start of a run: what each process computes."""
    heads, _ = _heads(config.get_text_config())
    return (
        f"sequence parallel: {size} processes share every row; each computes {seq_len // size} of its {seq_len} "
        f"tokens, and in attention {heads // size} of {heads} heads over all of them"
    )


def _heads(config: Any) -> tuple[int, int]:
    """(attention heads, key-value heads) of a text config."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(
            f"{SEQUENCE}: this model's config has no number of attention heads to split over processes"
        )
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
