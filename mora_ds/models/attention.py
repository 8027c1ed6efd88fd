"""Selects a model's attention: document attention (`document_attention`, or FlashAttention
with cu_seqlens), or transformers' dense attention.

why_dense(config, implementation)    the reason why a model cannot use document attention, or None
use_document_attention(model)        switches a model to document attention; see `uses_document_attention`
model_inputs(model, batch)           keyword arguments of a forward pass, with the documents if attention needs them
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from mora_ds.data.documents import Documents
from mora_ds.models import document_attention

NAME = document_attention.NAME

_FLASH = "flash_attention"
_KINDS = {"full_attention", "sliding_attention"}
"""Layer types of transformers that are supported."""

_ATTRIBUTE = "_mora_ds_document_attention"
"""Attribute of a model that uses document attention."""


def why_dense(config: Any, implementation: str | None) -> str | None:
    """The reason why a model cannot use document attention, as the end of a sentence
    with "because"; None if it can.

    `implementation`: the user's attn_implementation; None for the default.
    """
    if implementation is not None and not is_flash(implementation):
        return f"--attn_implementation {implementation} reads masks"
    text = config.get_text_config()
    if unsupported := sorted(set(getattr(text, "layer_types", None) or ()) - _KINDS):
        return f"the model has layers of the type {unsupported[0]}"
    is_bidirectional = getattr(text, "use_bidirectional_attention", None)
    if is_bidirectional or getattr(text, "is_causal", True) is False:
        return "the model's attention is not causal"
    # The private table (models/auto/auto_factory.py, `_BaseAutoModelClass`) has the
    # models of transformers, but none with remote code
    models: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in models:
        return "the model's code is not in transformers"
    kind = models[type(config)]
    # Both are true for models that call attention through `ALL_ATTENTION_FUNCTIONS`
    # (modeling_utils.py, `PreTrainedModel`)
    if not (kind._supports_attention_backend and kind._can_set_attn_implementation()):
        return f"transformers calls the attention of {kind.__name__} directly"
    return None


def is_flash(implementation: str) -> bool:
    """Whether this is transformers' FlashAttention, which accepts cu_seqlens."""
    return _FLASH in implementation


def attention_of(model: Any) -> str:
    """The name of a model's attention implementation in transformers."""
    return str(model.config.get_text_config()._attn_implementation)


def use_document_attention(model: Any) -> None:
    """Switch the model to document attention. FlashAttention is kept."""
    vars(model)[_ATTRIBUTE] = True
    if not is_flash(attention_of(model)):
        document_attention.register()
        model.set_attn_implementation(NAME)


def uses_document_attention(model: Any) -> bool:
    """Whether the model uses document attention."""
    return _ATTRIBUTE in vars(model)


def prefer_document_attention(model: Any) -> Any:
    """Switch `model` to document attention if it supports that, and return it."""
    if why_dense(model.config, None) is None and not is_flash(attention_of(model)):
        use_document_attention(model)
    return model


def model_inputs(
    model: Callable[..., object], batch: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of a forward pass of `model` (or its engine).

    A batch without `documents`: `document_attention` derives them from the positions;
    FlashAttention cannot for several sequences, so this raises KeyError.
    """
    inputs = {
        name: batch[name] for name in ("input_ids", "position_ids") if name in batch
    }
    inputs["use_cache"] = False
    owner: Any = getattr(model, "module", model)
    if not uses_document_attention(owner):
        return inputs
    if is_flash(attention_of(owner)):
        return {**inputs, **_flash_arguments(batch["documents"])}
    return (
        {**inputs, "documents": batch["documents"]} if "documents" in batch else inputs
    )


def _flash_arguments(documents: Documents) -> dict[str, Any]:
    """`FlashAttentionKwargs` of transformers/modeling_flash_attention_utils.py. With
    them `_flash_attention_forward` flattens a batch of any size."""
    bounds = documents.bounds
    longest = documents.longest
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
