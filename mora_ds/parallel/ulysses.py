"""Ulysses sequence parallelism with DeepSpeed's attention: every sequence is split over s
consecutive ranks.

    sequences (B, T), the same on all s ranks -> rank i takes tokens [i T/s, (i + 1) T/s)
    -> embeddings, linear layers, adapters, head and loss of these tokens only
    attention: an all-to-all exchanges tokens for heads, so that a rank has H/s heads
    over all T tokens; a second one exchanges them back

    bind_sequence_parallel    binds a model to its group of ranks; None for a group of one
    SequenceParallel          the group; split(batch) takes this rank's part of sequences
    full_sequences            a context in which each rank computes full sequences by itself

`UlyssesSPAttentionHF` (deepspeed/runtime/sequence_parallel/ulysses_sp.py) does the
all-to-all. Differences to DeepSpeed's use of it:

- `register_with_transformers` is not used, because it needs a constant batch size and num_key_value_heads in the
  config, and drops every mask. Instead there is an instance for each shape of attention; document attention knows the
  documents of the full sequences; and models that are not bound are unchanged.
- DeepSpeed gets no mpu (deepspeed/utils/groups.py): for ZeRO all ranks are data parallel. The loss is a sum over
  tokens, so the gradient of the global batch is the sum over all ranks, independent of which tokens they have.
  Sharding, checkpoints and merges do not depend on s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import deepspeed.comm as dist
import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mora_ds.common.attributes import replaced
from mora_ds.common.errors import UserError
from mora_ds.models.attention import NAME, attention_of, is_flash, why_dense
from mora_ds.parallel.limits import SEQUENCE

_BOUND = "_mora_ds_sequence"
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest position (modeling_rope_utils.py)."""
_dispatched: set[str] = set()

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def bind_sequence_parallel(
    model: nn.Module,
    size: int,
    timeout_s: float | None = None,
) -> SequenceParallel | None:
    """Split each sequence over `size` consecutive ranks; returns None for size 1.
    Collective.

    `timeout_s`: timeout of collectives in a group (None: torch's default). Raises
    `UserError` for a model without document attention, because masks are not split.
    """
    if size == 1:
        return None
    core = attention_of(model)
    if core != NAME and not is_flash(core):
        raise UserError(
            f"{SEQUENCE}: {core} attention reads masks, which are not split: use document attention"
        )
    sequence = SequenceParallel(size, _group(size, timeout_s))
    _dispatch(core)
    for module in model.modules():
        setattr(module, _BOUND, sequence)
    return sequence


def full_sequences(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a bound model takes full sequences. Without gradients only."""
    sequence = sequence_parallel_of(model)
    return nullcontext() if sequence is None else replaced(sequence, "splits", False)


def sequence_parallel_of(module: nn.Module) -> SequenceParallel | None:
    """The group that a model (or a module of it) is bound to; None if it is not
    bound."""
    return module.__dict__.get(_BOUND)


class SequenceParallel:
    """The group of ranks that split sequences, and attention over it."""

    def __init__(self, size: int, group: Any) -> None:
        self.size = size
        self.group = group
        self.rank = dist.get_rank(group)
        self.splits = True
        """Whether the inputs of the bound model are parts of sequences."""
        self.saw_window = False
        """Whether any attention was called with a sliding window."""
        self._ulysses: dict[tuple[int, ...], UlyssesSPAttentionHF] = {}

    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's tokens of a batch: tensors (B, T) -> (B, T/s). Labels must
        already be shifted, so that the last token of a part predicts the first token of
        the next part. `documents` stay those of the full sequences, which attention
        computes."""
        split = dict(batch)
        for name, tensor in batch.items():
            if isinstance(tensor, Tensor):
                parts = tensor.unflatten(1, (self.size, -1))
                split[name] = parts[:, self.rank].contiguous()
        return split

    def attend(
        self,
        core: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer's attention: query (B, H, T/s, D), key and value (B, H_kv, T/s, D)
        -> (B, T/s, H, D). `core`: attention over full sequences."""
        _check_call(key, value, kwargs)
        # Attention sinks are per head: take those of this rank's heads
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = kwargs["s_aux"].unflatten(0, (self.size, -1))[self.rank]
        self.saw_window |= kwargs.get("sliding_window") is not None
        ulysses = self._ulysses_for(query, key)
        ulysses.attn = core
        groups = getattr(module, "num_key_value_groups", None)
        try:
            out, weights = ulysses(module, query, key, value, None, **kwargs)
        finally:
            if groups is not None:
                # Ulysses changes it when it repeats key-value heads
                module.num_key_value_groups = groups
        return out.unflatten(-1, (query.shape[1], -1)), weights

    def _ulysses_for(self, query: Tensor, key: Tensor) -> UlyssesSPAttentionHF:
        shape = (query.shape[0], query.shape[1], key.shape[1], query.shape[3])
        if shape not in self._ulysses:
            batch, heads, kv_heads, head_size = shape
            check_heads(self.size, heads, kv_heads)
            self._ulysses[shape] = UlyssesSPAttentionHF(
                attn=None,
                batch_size=batch,
                attn_head_count=heads,
                attn_head_size=head_size,
                kv_head_count=kv_heads,
                # Used in a debug mode only
                num_hidden_layers=1,
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._ulysses[shape]


def _check_call(key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for attention that Ulysses would compute wrongly."""
    if key.shape != value.shape:
        raise UserError(
            f"{SEQUENCE}: this model's keys and values have different shapes, which Ulysses does not support"
        )
    if arguments.get("position_ids") is None:
        raise UserError(
            f"{SEQUENCE}: this model does not pass its attention the position_ids that Ulysses needs"
        )
    if arguments.get("position_bias") is not None:
        raise UserError(
            f"{SEQUENCE}: this model's attention has a position bias for each head, which is not split"
        )


# -- changes to models and to transformers ---------------------------------------------


def _dispatch(name: str) -> None:
    """Wrap transformers' attention `name`: bound modules use Ulysses, all others do
    not."""
    if name in _dispatched:
        return
    core = ALL_ATTENTION_FUNCTIONS[name]

    def dispatched(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        sequence = sequence_parallel_of(module)
        if sequence is None or not sequence.splits:
            return core(module, query, key, value, attention_mask, **kwargs)
        return sequence.attend(core, module, query, key, value, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, dispatched)
    _dispatched.add(name)


@cache
def _group(size: int, timeout_s: float | None) -> Any:
    """This rank's group of `size` consecutive ranks, created once. Collective."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    first = dist.get_rank() // size * size
    # Every rank takes part in the making of every group; deepspeed.comm.new_group takes
    # no timeout
    groups = {
        start: torch.distributed.new_group(
            list(range(start, start + size)), timeout=timeout
        )
        for start in range(0, dist.get_world_size(), size)
    }
    return groups[first]


# -- checks of a model's config --------------------------------------------------------
#
# Before any text is read. Later `train/preflight.py` compares the model's logits of split
# and full sequences.


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


def check_heads(size: int, heads: int, kv_heads: int) -> None:
    """Raise `UserError` unless the heads can be divided among the ranks. Too few
    key-value heads are repeated."""
    if heads % size:
        raise UserError(
            f"{SEQUENCE} {size} does not divide the model's {heads} attention heads: each rank takes some of them"
        )
    if kv_heads % size and size % kv_heads:
        raise UserError(
            f"{SEQUENCE} {size} and the model's {kv_heads} key-value heads: one must divide the other, so that each "
            "rank takes some of them or several take the same one"
        )
