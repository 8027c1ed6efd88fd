"""A model's attention: inside each document of packed sequences (document attention), or
transformers' dense attention where a model cannot use that.

why_dense(config, implementation)    the reason why a model cannot use document attention, or None
use_document_attention(model)        switches a model to document attention; see `uses_document_attention`
model_inputs(model, batch)           keyword arguments of a forward pass, with the documents if attention needs them

Document attention is causal, and needs neither a mask nor (T, T) scores. transformers
calls it by its registered name; FlashAttention gets the documents as cu_seqlens instead.

    batch (B, H, T, D) -> tokens of all sequences (N, H, D), N = B T, and their `Documents`
    -> (B, T, H, D)

    CUDA, bf16 or fp16    torch's flash attention: one kernel for all documents
    otherwise             scaled_dot_product_attention; short documents of similar length are batched, padded at the
                          right, which causal attention ignores; long ones with a sliding window in blocks of queries
    soft caps, sinks      blocks of queries whose scores are recomputed in backward (Gemma 2, GPT-OSS), because torch's
                          kernels support neither; a sink is an additional score with a value of 0

Grouped key-value heads are repeated only for scaled_dot_product_attention on CUDA.

A model passes the batch's documents to its attention as the keyword argument
`documents`. Without it they are derived from the positions; without both, a sequence is
one document. With a padding mask or a cache, transformers' attention is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mora_ds.data.documents import Documents

NAME = "mora_ds_documents"
"""The name of document attention in transformers, after `register`."""

QUERIES = 256
"""Queries per block if scores are computed explicitly: (n, H, QUERIES, keys) in
memory."""

_SHORT = 512
"""Longer documents are computed one by one, because batching them saves nothing."""

_FLASH_HEAD = 256
"""The largest head size of torch's flash attention on CUDA."""

MakeMask = Callable[[], Tensor]
"""Returns a mask (C, K) or (n, 1, C, K), true where a query attends to a key. A function,
so that no mask is saved for backward."""

_FLASH = "flash_attention"
_KINDS = {"full_attention", "sliding_attention"}
"""Layer types of transformers that are supported."""

_ATTRIBUTE = "_mora_ds_document_attention"
"""Attribute of a model that uses document attention."""


# -- which attention a model uses ------------------------------------------------------


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
        register()
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


# -- document attention ----------------------------------------------------------------


def register() -> None:
    """Register document attention with transformers, once."""
    # Keeps the wrapper of `ulysses` around a registered attention
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, document_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    position_ids: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (B, H, T, D), key (B, H_kv, T, D), value
    (B, H_kv, T, D_v) -> (B, T, H, D_v). `s_aux`: (H,) attention sinks. Raises
    ValueError for non-causal attention, a position bias, and documents of another
    batch size."""
    is_causal = arguments.get("is_causal", getattr(module, "is_causal", True))
    if arguments.get("position_bias") is not None or is_causal is False:
        raise ValueError(
            "document attention is causal and supports no position bias: give --attn_implementation sdpa"
        )
    batch_size, heads, length, size = query.shape
    scores = Scores(size**-0.5 if scaling is None else scaling, softcap, s_aux, dropout)
    if attention_mask is not None or length != key.shape[2]:
        return _masked(module, query, key, value, attention_mask, scores), None
    if documents is None:
        documents = _from_positions(position_ids, query)
    if documents.tokens != batch_size * length:
        raise ValueError(
            f"the documents have {documents.tokens} tokens, but the batch has {batch_size} sequences of {length}"
        )
    documents.windows.add(sliding_window)
    window = sliding_window
    if window is not None and window >= documents.longest:
        window = None
    fits = fits_varlen(query, value, scores)
    tensors = (query, key, value)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors)
    if fits:
        out = _varlen(query, key, value, documents, window, scores)
    else:
        out = by_documents(query, key, value, documents.lengths, window, scores)
    # Contiguous like transformers' attention, because AFMoE takes a view of it
    return out.view(batch_size, length, heads, value.shape[2]).contiguous(), None


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor | None:
    """Transformers' mask interface: no mask, except for padding, a cache or custom
    masks."""
    if (
        attention_mask is None
        and q_length == kv_length
        and not arguments.get("use_vmap")
    ):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **arguments,
    )


def _from_positions(positions: Tensor | None, query: Tensor) -> Documents:
    batch_size, _, length, _ = query.shape
    if positions is None or positions.is_meta or positions.shape[1:] != (length,):
        return Documents.one_per_sequence(batch_size, length, query.device)
    return Documents.of(positions.expand(batch_size, -1).cpu()).to(query.device)


@dataclass(frozen=True)
class Scores:
    """How a layer converts query-key products to attention weights."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def fit_kernels(self) -> bool:
        """Whether torch's kernels support these scores."""
        return self.softcap is None and self.sinks is None


# -- one kernel over all documents -----------------------------------------------------


def fits_varlen(query: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether torch's varlen kernel supports this. The meta device counts as a GPU."""
    return (
        (query.is_meta or (query.is_cuda and has_flash(query.device)))
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[3], value.shape[3]) <= _FLASH_HEAD
        and scores.fit_kernels
        and scores.dropout == 0
    )


@lru_cache
def has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    window: int | None,
    scores: Scores,
) -> Tensor:
    """(N, H, D), (N, H_kv, D), (N, H_kv, D_v) -> (N, H, D_v), by torch's flash
    attention (aten/src/ATen/native/native_functions.yaml). Called directly, because its
    wrapper `torch.nn.attention.varlen` changes with every version of torch. All head
    sizes must be equal and a multiple of 8."""
    head = value.shape[2]
    padded = -(-max(query.shape[2], value.shape[2]) // 8) * 8
    query, key, value = (_padded(tensor, padded) for tensor in (query, key, value))
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        0.0,  # dropout
        window is None,  # causal; a window is causal by window_size_right
        return_debug_mask=False,
        scale=scores.scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return out[..., :head]


def _padded(tensor: Tensor, size: int) -> Tensor:
    missing = size - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


# -- batches of documents --------------------------------------------------------------


def _padded_length(length: int) -> int:
    """Documents with the same padded length are batched. At most a quarter is
    padding."""
    if length > _SHORT:
        return length
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def by_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    scores: Scores,
) -> Tensor:
    """(N, H, D), (N, H_kv, D), (N, H_kv, D_v) -> (N, H, D_v)."""
    tensors = (query, key, value)
    if len(set(lengths)) == 1:
        # No padding and no copies
        shape = (len(lengths), lengths[0])
        query, key, value = (
            tensor.unflatten(0, shape).transpose(1, 2) for tensor in tensors
        )
        return _causal(query, key, value, window, scores).transpose(1, 2).flatten(0, 1)
    by_size: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        by_size.setdefault(_padded_length(length), []).append(document)
    documents = [tensor.split(lengths) for tensor in tensors]
    outs: dict[int, Tensor] = {}
    for members in by_size.values():
        query, key, value = (
            _pad_and_stack([split[i] for i in members]) for split in documents
        )
        out = _causal(query, key, value, window, scores).transpose(1, 2)
        for member, padded_out in zip(members, out, strict=True):
            outs[member] = padded_out[: lengths[member]]
    return torch.cat([outs[document] for document in range(len(lengths))])


def _pad_and_stack(documents: list[Tensor]) -> Tensor:
    """n tensors (L, H, D) -> (n, H, longest L, D), padded at the right."""
    if len(documents) == 1:
        return documents[0].unsqueeze(0).transpose(1, 2)
    return pad_sequence(documents, batch_first=True).transpose(1, 2)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scores: Scores,
) -> Tensor:
    """Causal attention of n documents of one length: (n, H, L, D) -> (n, H, L, D_v). If
    torch's kernels do not support the scores, or a window is shorter than L, it runs in
    blocks of queries, each with the keys that the block attends to."""
    length = query.shape[2]
    if window is not None and window >= length:
        window = None
    attend: Callable[..., Tensor] = _checkpointed
    step = QUERIES
    if scores.fit_kernels:
        attend = _sdpa
        if window is None:
            return _sdpa(scores, query, key, value, None)
        step = min(max(window, 128), 512)
    outs = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        first = 0 if window is None else max(0, begin - window + 1)
        make_mask = partial(
            causal_mask, begin - first, end - begin, end - first, window, query.device
        )
        queries = query[:, :, begin:end]
        keys = key[:, :, first:end]
        outs.append(attend(scores, queries, keys, value[:, :, first:end], make_mask))
    return torch.cat(outs, dim=2)


def causal_mask(
    offset: int,
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(queries, keys): true where a query attends to a key. The first query is at key
    `offset`."""
    query_at = torch.arange(offset, offset + queries, device=device)
    distance = query_at[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _sdpa(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    make_mask: MakeMask | None,
) -> Tensor:
    """scaled_dot_product_attention of query (n, H, C, D), key (n, H_kv, K, D) and value
    (n, H_kv, K, D_v). Causal with C = K if there is no `make_mask`."""
    head = value.shape[3]
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.is_cuda:
        # Cases that the varlen kernel does not support (fp32, large heads, masks) use
        # torch's memory-efficient kernel, which does not support grouped heads: torch
        # would silently use the kernel that keeps all (T, T) scores.
        key, value = (
            tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            for tensor in (key, value)
        )
        is_grouped = False
    out = F.scaled_dot_product_attention(
        query,
        key,
        _padded(value, query.shape[3]) if head < query.shape[3] else value,
        attn_mask=None if make_mask is None else make_mask(),
        dropout_p=scores.dropout,
        is_causal=make_mask is None,
        scale=scores.scale,
        enable_gqa=is_grouped,
    )
    return out[..., :head]


# -- scores in blocks ------------------------------------------------------------------


def _checkpointed(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    make_mask: MakeMask,
) -> Tensor:
    """Like `_sdpa`, but for all kinds of scores, which are recomputed in backward."""
    arguments = (scores, query, key, value, make_mask)
    if not torch.is_grad_enabled():
        return _explicit(*arguments)
    out: Tensor = checkpoint(_explicit, *arguments, use_reentrant=False)
    return out


def _explicit(
    how: Scores, query: Tensor, key: Tensor, value: Tensor, make_mask: MakeMask
) -> Tensor:
    """Attention with explicit scores. The queries of a key-value head are concatenated,
    so no key is repeated."""
    shared = key.shape[1]
    count = query.shape[2]
    groups = query.shape[1] // shared
    wide = torch.promote_types(query.dtype, torch.float32)
    if how.softcap is None:
        # Scores without a cap may be large, and in bf16 off by an eighth
        query = query.to(wide)
        key = key.to(wide)
    grouped = query.unflatten(1, (shared, groups)).flatten(2, 3)
    scores = grouped @ key.transpose(-1, -2) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.unflatten(2, (groups, count))  # (n, H_kv, groups, C, K)
    mask = make_mask()
    mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype).view(shared, groups, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:4], 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(value.dtype)
    weights = F.dropout(
        weights if how.sinks is None else weights[..., :-1], how.dropout
    )
    return (weights.flatten(2, 3) @ value).unflatten(2, (groups, count)).flatten(1, 2)


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
) -> Tensor:
    """Attention with a mask (B, 1, T, S), or without one of the last T of S tokens. ->
    (B, T, H, D_v)."""
    if scores.fit_kernels:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, scores.dropout, scores.scale
        )
        return out
    length = query.shape[2]
    keys = key.shape[2]
    if mask is None:
        mask = causal_mask(keys - length, length, keys, None, query.device)[None, None]
    outs = []
    for begin in range(0, length, QUERIES):
        queries = query[:, :, begin : begin + QUERIES]
        make_mask = partial(mask.narrow, 2, begin, queries.shape[2])
        outs.append(_checkpointed(scores, queries, key, value, make_mask))
    return torch.cat(outs, dim=2).transpose(1, 2)
