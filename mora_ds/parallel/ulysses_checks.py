"""Which models --sequence_parallel_size serves, from a model's config, before any text is read.

`train/preflight.py` then compares a split row of the model itself to the complete row.
"""

from __future__ import annotations

from typing import Any

import torch

from mora_ds.common.errors import UserError
from mora_ds.models.attention import attention_of
from mora_ds.models.load import make_model
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import check_core, check_heads


def check_config(config: Any, size: int, attn_implementation: str | None, trust_remote_code: bool = False) -> None:
    """Raises `UserError` for a model whose config shows that its rows cannot be split over `size` processes.
    `attn_implementation` None: transformers' default."""
    if size == 1:
        return
    text = config.get_text_config()
    heads, kv_heads = _heads(text)
    check_heads(size, heads, kv_heads)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    if chunked:
        raise UserError(f"{SEQUENCE}: this model attends in chunks, which Ulysses does not support")
    if attn_implementation is None:
        with torch.device("meta"):
            model = make_model(config, SEQUENCE, trust_remote_code=trust_remote_code)
        attn_implementation = attention_of(model)
    check_core(attn_implementation)


def describe(config: Any, size: int, seq_len: int) -> str:
    """One line for the start of a run: what each process computes."""
    heads, kv_heads = _heads(config.get_text_config())
    kv = f"{kv_heads // size} of {kv_heads}"
    if kv_heads < size:
        kv = f"1 of {kv_heads}, each on {size // kv_heads} processes"
    return (
        f"sequence parallel: {size} processes share every row; each computes {seq_len // size} of its {seq_len} "
        f"tokens, in attention {heads // size} of {heads} heads (key-value heads {kv}) over all of them; "
        "each holds all of the base"
    )


def _heads(config: Any) -> tuple[int, int]:
    """(attention heads, key-value heads) of a text config."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(f"{SEQUENCE}: this model's config has no number of attention heads to split over processes")
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
