"""What a user can get wrong about --sequence_parallel_size, found before the first step; and what it does, in a line.

check_world, check_config    from numbers and a config, before any text is read
check_split                  with the model: is a split row what the whole row is?
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mora_ds.errors import UserError
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import check_core, check_heads, core_of


def check_config(config: Any, size: int, attn_implementation: str | None, trust_remote_code: bool = False) -> None:
    """Raises `UserError` for a model that cannot be split over `size` ranks, as far as its config tells.
    `attn_implementation` None: transformers' own choice."""
    if size == 1:
        return
    text = config.get_text_config()
    heads, kv_heads = _heads(text)
    check_heads(size, heads, kv_heads)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    if chunked:
        raise UserError(f"{SEQUENCE}: this model attends in chunks, which Ulysses does not know")
    if attn_implementation is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        attn_implementation = core_of(model)
    check_core(attn_implementation)


def describe(config: Any, size: int, seq_len: int) -> str:
    """What each rank computes, for the start of a run."""
    heads, kv_heads = _heads(config.get_text_config())
    kv = f"{kv_heads // size} of {kv_heads}"
    if kv_heads < size:
        kv = f"1 of {kv_heads}, each on {size // kv_heads} ranks"
    return (
        f"sequence parallel: {size} ranks share every row; each computes {seq_len // size} of its {seq_len} tokens, in "
        f"attention {heads // size} of {heads} heads (key-value heads {kv}) over all of them; the base is whole on each"
    )


def _heads(config: Any) -> tuple[int, int]:
    """(attention heads, key-value heads) of a text config."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(f"{SEQUENCE}: this model's config names no number of attention heads to share out over ranks")
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
