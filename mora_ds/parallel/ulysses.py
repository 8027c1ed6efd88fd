"""Ulysses sequence parallelism with DeepSpeed's attention: s consecutive processes
share every row.

    rows (B, T), the same on all s processes -> process i takes tokens [i T/s, (i + 1) T/s)
    -> embeddings, linear layers and adapters, head, loss: of those tokens only ->
    attention: an all-to-all exchanges tokens for heads, so that a process has H/s heads
    over all T tokens, and another exchanges them back

    share_rows          binds a model to its group of processes; None where nothing is shared
    SequenceParallel    the group; split(batch) takes this process's part of rows
    whole_rows          a context in which the bound model takes complete rows, on each process by itself

`UlyssesSPAttentionHF` (deepspeed/runtime/sequence_parallel/ulysses_sp.py) does the
exchange. Of its surroundings:

- `register_with_transformers` is not used: it needs a constant batch size and num_key_value_heads in the config, and
  drops every mask. Here an instance is made for each shape of attention, attention is by documents, which every
  process knows of the complete rows, and models that are not bound are unchanged.
- DeepSpeed gets no mpu (deepspeed/utils/groups.py): to ZeRO all processes are equal. The loss is a sum over tokens, so
  the gradient of the global batch is the sum over all processes, whichever tokens they hold; sharding, checkpoints and
  merges do not depend on s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed.comm as dist
import torch
import torch.distributed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mora_ds.common.errors import UserError
from mora_ds.models.attention import NAME, attention_of, is_flash
from mora_ds.parallel.limits import SEQUENCE

_BOUND = "_mora_ds_sequence"
_dispatched: set[str] = set()
_groups: dict[int, Any] = {}

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def share_rows(
    model: nn.Module,
    size: int,
    timeout_s: float | None = None,
) -> SequenceParallel | None:
    """Let every `size` consecutive processes share each row; None for 1. Collective.

    `timeout_s`: of the collectives in a group (torch's default for None). Raises
    `UserError` for a model that does not attend by documents: masks of complete rows
    are not made.
    """
    if size == 1:
        return None
    core = attention_of(model)
    if core != NAME and not is_flash(core):
        raise UserError(
            f"{SEQUENCE}: {core} attention reads masks, which are not split: attend by documents"
        )
    sequence = SequenceParallel(size, _group(size, timeout_s))
    _dispatch(core)
    for module in model.modules():
        setattr(module, _BOUND, sequence)
    return sequence


def check_heads(size: int, heads: int, kv_heads: int) -> None:
    """Raises `UserError` unless the heads can be divided among the processes. Too few
    key-value heads are repeated."""
    if heads % size:
        raise UserError(
            f"{SEQUENCE} {size} does not divide the model's {heads} attention heads: each process takes some of them"
        )
    if kv_heads % size and size % kv_heads:
        raise UserError(
            f"{SEQUENCE} {size} and the model's {kv_heads} key-value heads: one must divide the other, so that each "
            "rank takes some of them or several take the same one"
        )


@contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """A bound model takes complete rows inside; for passes without gradients."""
    sequence = bound(model)
    if sequence is None:
        yield
        return
    before = sequence.splits
    sequence.splits = False
    try:
        yield
    finally:
        sequence.splits = before


def bound(module: nn.Module) -> SequenceParallel | None:
    """The group that `share_rows` bound a model (or a module of it) to; None for
    others."""
    return module.__dict__.get(_BOUND)


class SequenceParallel:
    """The group of processes that share rows, and attention over it."""

    def __init__(self, size: int, group: Any) -> None:
        self.size = size
        self.group = group
        self.rank = dist.get_rank(group)
        self.splits = True
        """Whether the bound model is given parts of rows."""
        self.saw_window = False
        """Whether any attention has been given a sliding window."""
        self._ulysses: dict[tuple[int, ...], UlyssesSPAttentionHF] = {}

    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This process's tokens of a batch: tensors (B, T) -> (B, T/s). Labels must
        have been shifted, so that the last token of a part still predicts the first of
        the next one. `documents` stay those of the complete rows, which attention
        sees."""
        split = dict(batch)
        for name, rows in batch.items():
            if isinstance(rows, Tensor):
                parts = rows.unflatten(1, (self.size, -1))
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
        -> (B, T/s, H, D). `core` runs over complete rows."""
        _check_call(key, value, kwargs)
        # There is an attention sink for each head, and this process has some of the
        # heads
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
                # Ulysses changes it where it repeats key-value heads
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
                # Read in a debugging mode only
                num_hidden_layers=1,
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._ulysses[shape]


def _check_call(key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raises `UserError` for attention that Ulysses would compute wrongly."""
    if key.shape != value.shape:
        raise UserError(
            f"{SEQUENCE}: this model's keys and values differ in shape, which Ulysses does not support"
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
    """Wrap transformers' attention `name`: bound modules take Ulysses, all others
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
        sequence = bound(module)
        if sequence is None or not sequence.splits:
            return core(module, query, key, value, attention_mask, **kwargs)
        return sequence.attend(core, module, query, key, value, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, dispatched)
    _dispatched.add(name)


def _group(size: int, timeout_s: float | None) -> Any:
    """This process's group of `size` consecutive ranks, made once. Collective."""
    if size not in _groups:
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        for first in range(0, dist.get_world_size(), size):
            members = list(range(first, first + size))
            # Not by deepspeed.comm, whose function takes no timeout
            group = torch.distributed.new_group(members, timeout=timeout)
            if dist.get_rank() in members:
                _groups[size] = group
    return _groups[size]
