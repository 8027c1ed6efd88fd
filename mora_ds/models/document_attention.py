"""Causal attention inside each document of packed rows, registered with transformers:
no mask, no (T, T) scores.

    rows (B, H, T, D) -> tokens of all rows (N, H, D), N = B T, with the `Documents` in them
    -> (B, T, H, D)

    CUDA, bf16 or fp16    torch's flash attention: one kernel over all documents
    otherwise             scaled_dot_product_attention; short documents of similar length together, padded at the right,
                          where causal attention never looks; long ones under a sliding window in blocks of queries
    capped scores, sinks  in blocks of queries whose scores are recomputed in backward (Gemma 2, GPT-OSS), as torch's
                          kernels have neither: a sink is one more score, which takes weight and gives nothing

Grouped key-value heads are repeated only for scaled_dot_product_attention on CUDA.

The documents come with the batch, as the keyword argument `documents` that models hand
down to their attention. Without it they are read from the positions, and where a model
hands down neither, a row is one document. With a mask of padding or a cache, attention
is transformers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mora_ds.data.documents import Documents

NAME = "mora_ds_documents"
"""Its name in transformers, once `register` has been called."""

QUERIES = 256
"""Queries in a block whose scores are computed: (n, H, QUERIES, keys) exist at a
time."""

_SHORT = 512
"""Documents of more tokens are computed one by one, as padding would save nothing."""

_FLASH_HEAD = 256
"""The largest head size of torch's flash attention on CUDA."""

Seen = Callable[[], Tensor]
"""Makes (C, K), or (n, 1, C, K), true where a query sees a key; backward keeps no
mask."""


def register() -> None:
    """Make the attention known to transformers, once."""
    # What `ulysses` has wrapped around a registered one stays
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
    ValueError for attention that is not causal or has a bias, and for documents of
    another batch."""
    is_causal = arguments.get("is_causal", getattr(module, "is_causal", True))
    if arguments.get("position_bias") is not None or is_causal is False:
        raise ValueError(
            "attention by documents is causal and has no position bias: give --attn_implementation sdpa"
        )
    rows, heads, length, size = query.shape
    scores = Scores(size**-0.5 if scaling is None else scaling, softcap, s_aux, dropout)
    if attention_mask is not None or length != key.shape[2]:
        return _masked(module, query, key, value, attention_mask, scores), None
    if documents is None:
        documents = _from_positions(position_ids, query)
    if documents.tokens != rows * length:
        raise ValueError(
            f"documents of {documents.tokens} tokens came with {rows} rows of {length}"
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
        out = _by_documents(query, key, value, documents.lengths, window, scores)
    # Contiguous as transformers' own: AFMoE takes a view of it
    return out.view(rows, length, heads, value.shape[2]).contiguous(), None


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor | None:
    """Transformers' mask interface: none, but for padding, a cache or other rules."""
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
    rows, _, length, _ = query.shape
    if positions is None or positions.is_meta or positions.shape[1:] != (length,):
        return Documents.one_per_sequence(rows, length, query.device)
    return Documents.of(positions.expand(rows, -1).cpu()).to(query.device)


@dataclass(frozen=True)
class Scores:
    """How a layer makes weights of query-key products."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def suit_kernels(self) -> bool:
        """Whether torch's kernels compute these scores."""
        return self.softcap is None and self.sinks is None


# -- one kernel over all documents -----------------------------------------------------


def fits_varlen(query: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether torch's varlen kernel computes this; a meta device stands for a GPU."""
    return (
        (query.is_meta or (query.is_cuda and _has_flash(query.device)))
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[3], value.shape[3]) <= _FLASH_HEAD
        and scores.suit_kernels
        and scores.dropout == 0
    )


@lru_cache
def _has_flash(device: torch.device) -> bool:
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
    attention (aten/src/ATen/native/native_functions.yaml), which
    `torch.nn.attention.varlen` wraps in another way in every version of torch. It wants
    one head size, a multiple of 8."""
    head = value.shape[2]
    wanted = -(-max(query.shape[2], value.shape[2]) // 8) * 8
    query, key, value = (_padded(tensor, wanted) for tensor in (query, key, value))
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        0.0,  # dropout
        window is None,  # whether a query sees all that comes before it
        return_debug_mask=False,
        scale=scores.scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return out[..., :head]


def _padded(tensor: Tensor, size: int) -> Tensor:
    missing = size - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


# -- document by document --------------------------------------------------------------


def _rounded(length: int) -> int:
    """The length by which documents are put together: a quarter of padding at most."""
    if length > _SHORT:
        return length
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _by_documents(
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
        # Nothing to pad, nothing to copy
        shape = (len(lengths), lengths[0])
        query, key, value = (
            tensor.unflatten(0, shape).transpose(1, 2) for tensor in tensors
        )
        return _rows(query, key, value, window, scores).transpose(1, 2).flatten(0, 1)
    by_size: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        by_size.setdefault(_rounded(length), []).append(document)
    documents = [tensor.split(lengths) for tensor in tensors]
    outs: dict[int, Tensor] = {}
    for members in by_size.values():
        query, key, value = (
            _stacked([split[i] for i in members]) for split in documents
        )
        out = _rows(query, key, value, window, scores).transpose(1, 2)
        for member, row in zip(members, out, strict=True):
            outs[member] = row[: lengths[member]]
    return torch.cat([outs[document] for document in range(len(lengths))])


def _stacked(documents: list[Tensor]) -> Tensor:
    """(L, H, D) each -> (n, H, longest L, D), padded at the right."""
    if len(documents) == 1:
        return documents[0].unsqueeze(0).transpose(1, 2)
    return pad_sequence(documents, batch_first=True).transpose(1, 2)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scores: Scores,
) -> Tensor:
    """Causal attention of documents of one length: (n, H, L, D) -> (n, H, L, D_v).
    Where scores are computed, or a window is shorter than a document, in blocks of
    queries with the keys that they see."""
    length = query.shape[2]
    if window is not None and window >= length:
        window = None
    attend: Callable[..., Tensor] = _scored
    step = QUERIES
    if scores.suit_kernels:
        attend = _fused
        if window is None:
            return _fused(scores, query, key, value, None)
        step = min(max(window, 128), 512)
    outs = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        first = 0 if window is None else max(0, begin - window + 1)
        seen = partial(
            _seen, begin - first, end - begin, end - first, window, query.device
        )
        queries = query[:, :, begin:end]
        keys = key[:, :, first:end]
        outs.append(attend(scores, queries, keys, value[:, :, first:end], seen))
    return torch.cat(outs, dim=2)


def _seen(
    offset: int,
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(queries, keys): true where a query sees a key; the first stands at `offset`."""
    query_at = torch.arange(offset, offset + queries, device=device)
    distance = query_at[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _fused(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Seen | None,
) -> Tensor:
    """Attention of query (n, H, C, D) to key (n, H_kv, K, D) and value
    (n, H_kv, K, D_v), by a kernel of torch; without `seen` causal, with C = K."""
    head = value.shape[3]
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.is_cuda:
        # What varlen kernels do not compute (fp32, large heads, masks) torch gives to
        # its memory-efficient kernel. That knows no grouped heads: with these, torch
        # would silently take the kernel that keeps all (T, T) scores.
        key, value = (
            tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            for tensor in (key, value)
        )
        is_grouped = False
    out = F.scaled_dot_product_attention(
        query,
        key,
        _padded(value, query.shape[3]) if head < query.shape[3] else value,
        attn_mask=None if seen is None else seen(),
        dropout_p=scores.dropout,
        is_causal=seen is None,
        scale=scores.scale,
        enable_gqa=is_grouped,
    )
    return out[..., :head]


# -- scores in blocks ------------------------------------------------------------------


def _scored(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Seen,
) -> Tensor:
    """As `_fused`, but the scores are computed again in backward."""
    arguments = (scores, query, key, value, seen)
    if not torch.is_grad_enabled():
        return _weigh(*arguments)
    out: Tensor = checkpoint(_weigh, *arguments, use_reentrant=False)
    return out


def _weigh(
    how: Scores, query: Tensor, key: Tensor, value: Tensor, seen: Seen
) -> Tensor:
    """Queries that share a key-value head lie one after the other: no key is
    repeated."""
    shared = key.shape[1]
    count = query.shape[2]
    groups = query.shape[1] // shared
    wide = torch.promote_types(query.dtype, torch.float32)
    if how.softcap is None:
        # Without a bound: in bf16 large scores would be off by an eighth
        query = query.to(wide)
        key = key.to(wide)
    grouped = query.unflatten(1, (shared, groups)).flatten(2, 3)
    scores = grouped @ key.transpose(-1, -2) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.unflatten(2, (groups, count))  # (n, H_kv, groups, C, K)
    mask = seen()
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
    """Attention with a mask (B, 1, T, S), or of the last T of S tokens:
    (B, T, H, D_v)."""
    if scores.suit_kernels:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, scores.dropout, scores.scale
        )
        return out
    length = query.shape[2]
    keys = key.shape[2]
    if mask is None:
        mask = _seen(keys - length, length, keys, None, query.device)[None, None]
    outs = []
    for begin in range(0, length, QUERIES):
        queries = query[:, :, begin : begin + QUERIES]
        seen = partial(mask.narrow, 2, begin, queries.shape[2])
        outs.append(_scored(scores, queries, key, value, seen))
    return torch.cat(outs, dim=2).transpose(1, 2)
