"""Which attention a model runs: by documents (`document_attention`, or FlashAttention
with bounds), or dense.

why_dense(config, implementation)    why a model cannot attend by documents; None where it can
use_documents(model)                 from here on it does; `attends_by_documents` tells
model_inputs(model, batch)           keyword arguments of a pass, with the batch's documents where attention reads them
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from mora_ds.data.documents import Documents
from mora_ds.models import document_attention

NAME = document_attention.NAME

_FLASH = "flash_attention"
_KINDS = {"full_attention", "sliding_attention"}
"""Transformers' names of layers that see earlier tokens, all or those in a window."""

_BY_DOCUMENTS = "_mora_ds_attends_by_documents"
"""Attribute of a model that attends by documents."""


def why_dense(config: Any, implementation: str | None) -> str | None:
    """Why a model cannot attend by documents, to be read after "because"; None: it can.

    `implementation`: transformers' attn_implementation that was asked for, None for its
    default.
    """
    if implementation is not None and not is_flash(implementation):
        return f"--attn_implementation {implementation} reads masks"
    text = config.get_text_config()
    if strange := sorted(set(getattr(text, "layer_types", None) or ()) - _KINDS):
        return f"the model has layers of the kind {strange[0]}"
    is_bidirectional = getattr(text, "use_bidirectional_attention", None)
    if is_bidirectional or getattr(text, "is_causal", True) is False:
        return "the model's attention is not causal"
    # The private table (models/auto/auto_factory.py, `_BaseAutoModelClass`) lists what
    # is transformers' own, and no code that comes with a model of the Hub
    models: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in models:
        return "the code of the model is not transformers' own"
    kind = models[type(config)]
    # By both, transformers says that a model calls its attention through
    # `ALL_ATTENTION_FUNCTIONS` (modeling_utils.py, `PreTrainedModel`)
    if not (kind._supports_attention_backend and kind._can_set_attn_implementation()):
        return f"transformers calls the attention of {kind.__name__} directly"
    return None


def is_flash(implementation: str) -> bool:
    """Whether this is FlashAttention in transformers, which takes bounds of
    documents."""
    return _FLASH in implementation


def attention_of(model: Any) -> str:
    """The name of a model's attention in transformers."""
    return str(model.config.get_text_config()._attn_implementation)


def use_documents(model: Any) -> None:
    """Let the model attend by documents. FlashAttention stays what it is."""
    vars(model)[_BY_DOCUMENTS] = True
    if not is_flash(attention_of(model)):
        document_attention.register()
        model.set_attn_implementation(NAME)


def attends_by_documents(model: Any) -> bool:
    """Whether `use_documents` was called for the model."""
    return _BY_DOCUMENTS in vars(model)


def prefer_documents(model: Any) -> Any:
    """`model`, attending by documents where it can."""
    if why_dense(model.config, None) is None and not is_flash(attention_of(model)):
        use_documents(model)
    return model


def model_inputs(
    model: Callable[..., object], batch: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of a forward pass of `model` (or of its engine) over a
    batch.

    `document_attention` finds the documents in the positions where the batch does not
    name them; FlashAttention does not where there is more than one row, and raises
    KeyError here.
    """
    inputs = {
        name: batch[name] for name in ("input_ids", "position_ids") if name in batch
    }
    inputs["use_cache"] = False
    owner: Any = getattr(model, "module", model)
    if not attends_by_documents(owner):
        return inputs
    if is_flash(attention_of(owner)):
        return {**inputs, **_flash_arguments(batch["documents"])}
    return (
        {**inputs, "documents": batch["documents"]} if "documents" in batch else inputs
    )


def _flash_arguments(documents: Documents) -> dict[str, Any]:
    """transformers/modeling_flash_attention_utils.py, `FlashAttentionKwargs`: with them
    rows are flattened, whatever their number (`_flash_attention_forward`)."""
    bounds = documents.bounds
    longest = documents.longest
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
