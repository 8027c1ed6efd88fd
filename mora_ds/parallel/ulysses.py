"""Ulysses sequence parallelism with DeepSpeed's own attention: s consecutive ranks share every row.

    rows (B, T), the same on all s ranks -> rank i keeps tokens [i T/s, (i + 1) T/s) -> embeddings, linear layers and
    squares, head, loss: of those tokens alone -> attention: an all-to-all trades tokens for heads, so that the rank
    sees H/s heads over all T tokens, and another trades them back

    share_rows          bind a model to its ranks; None where nothing is shared
    SequenceParallel    split(batch): this rank's part of rows
    whole_rows          within it the bound model takes whole rows, each rank for itself

`UlyssesSPAttentionHF` (deepspeed/runtime/sequence_parallel/ulysses_sp.py) does the trading. Of what surrounds it there:

- `register_with_transformers` is not used: it wants one batch size for good, num_key_value_heads in the config, and
  drops every mask. Here an instance is made for each shape that attention meets, sdpa and `capped_attention` get the
  mask of the whole rows (documents, sliding window) from the positions that Ulysses gathers, and models that are not
  bound are left alone.
- No mpu is given to DeepSpeed (deepspeed/utils/groups.py): all ranks are equals to ZeRO. The loss is a sum over tokens,
  so the gradient of the global batch is the sum over all ranks, whichever tokens they hold; and nothing of sharding,
  checkpoints or merging knows of s.
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

from mora_ds.errors import UserError
from mora_ds.parallel import softcap_attention
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.softcap_attention import caps_scores, use_capped_attention

CORES = ("sdpa", softcap_attention.NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4")
_MASKED = CORES[:2]
"""Attention of transformers that can run inside: eager needs scores of (T, T) for every head, DeepSpeed's Ulysses gives
flex_attention a plain causal mask whatever the model asks for. `_MASKED` of them read masks, not positions."""

_BOUND = "_mora_ds_sequence"
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies hang on the longest position of the batch (modeling_rope_utils.py)."""
_OF_HEADS = ("s_aux", "position_bias")
"""Tensors that transformers hands to attention beside queries, keys and values, with a part for each head."""
_dispatched: set[str] = set()
_groups: dict[int, Any] = {}

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def share_rows(model: nn.Module, size: int, timeout_s: float | None = None) -> SequenceParallel | None:
    """Let every `size` consecutive ranks share each row of `model`; None for a size of 1. Collective.

    `timeout_s`: of the collectives among them (torch's default for None).
    Raises `UserError` for attention that cannot be split.
    """
    if size == 1:
        return None
    use_capped_attention(model)
    core = attention_of(model)
    check_core(core)
    sequence = SequenceParallel(size, _group(size, timeout_s))
    _dispatch(core)
    for module in model.modules():
        setattr(module, _BOUND, sequence)
        if _depends_on_length(module):
            _share_longest_position(module, sequence)
    return sequence


def attention_of(model: Any) -> str:
    """The name of the attention that a model of transformers runs on."""
    return str(model.config.get_text_config()._attn_implementation)


def core_of(model: Any) -> str:
    """The name of that which it will run on over split rows: where it caps its scores, ours in the place of eager."""
    name = attention_of(model)
    return softcap_attention.NAME if name == "eager" and caps_scores(model.config.get_text_config()) else name


def check_core(name: str) -> None:
    """Raises `UserError` for attention that Ulysses does not run on."""
    if name in CORES:
        return
    raise UserError(
        f"{SEQUENCE}: {name} attention cannot be split over ranks; --attn_implementation must be one of auto, sdpa, "
        "flash_attention_2, flash_attention_3, flash_attention_4, where the model has it"
    )


def check_heads(size: int, heads: int, kv_heads: int) -> None:
    """Raises `UserError` unless every rank gets whole attention heads. Too few key-value heads are repeated."""
    if heads % size:
        raise UserError(
            f"{SEQUENCE} {size} does not divide the model's {heads} attention heads: each rank takes some of them"
        )
    if kv_heads % size and size % kv_heads:
        raise UserError(
            f"{SEQUENCE} {size} and the model's {kv_heads} key-value heads: one must divide the other, so that each "
            "rank takes some of them or several take the same one"
        )


@contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Within it a bound model takes whole rows and every rank computes all of them; for passes without gradients."""
    sequence = bound(model)
    if sequence is None:
        yield
        return
    before, sequence.splits = sequence.splits, False
    try:
        yield
    finally:
        sequence.splits = before


def bound(module: nn.Module) -> SequenceParallel | None:
    """What `share_rows` bound a model (or a module of it) to."""
    return module.__dict__.get(_BOUND)


class SequenceParallel:
    """The ranks that share this rank's rows, and how attention runs over them."""

    def __init__(self, size: int, group: Any) -> None:
        self.size, self.group = size, group
        self.rank = dist.get_rank(group)
        self.splits = True
        """Whether the bound model is given parts of rows."""
        self.saw_window = False
        """Whether any attention was told of a sliding window."""
        self._ulysses: dict[tuple[int, ...], UlyssesSPAttentionHF] = {}
        self._masks = _Masks()

    def split(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tokens of a batch: tensors (B, T) -> (B, T/s). Labels are shifted before, so that the last token
        of a part still predicts the first of the next one.
        """
        return {name: self._part(tensor) for name, tensor in batch.items()}

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (self.size, -1))[:, self.rank].contiguous()

    def longest(self, positions: Tensor) -> Tensor:
        """(1,) the largest position of whole rows, from this rank's part of them."""
        most = positions.max().reshape(1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return most

    def attend(
        self, core: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One layer's attention: query (B, H, T/s, D), key and value (B, H_kv, T/s, D) -> (B, T/s, H, D). `core` runs
        over whole rows."""
        _check_call(key, value, kwargs)
        self.saw_window |= kwargs.get("sliding_window") is not None
        ulysses = self._ulysses_for(query, key)
        ulysses.attn = core
        groups = getattr(module, "num_key_value_groups", None)
        try:
            out, weights = ulysses(module, query, key, value, None, **kwargs)
        finally:
            if groups is not None:  # Ulysses leaves another number behind where it repeats key-value heads
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
                num_hidden_layers=1,  # read in a debugging mode only
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._ulysses[shape]

    def masked(self, core: Attention) -> Attention:
        """`core` for one that reads neither positions nor windows: it gets the mask that says the same."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            mask = self._masks.of(kwargs["position_ids"], kwargs.get("sliding_window"))
            return core(module, query, key, value, mask, **kwargs)

        return attention


def _check_call(key: Tensor, value: Tensor, told: Mapping[str, Any]) -> None:
    """Raises `UserError` for a layer of attention that Ulysses would compute wrongly, or not at all."""
    if key.shape != value.shape:
        raise UserError(f"{SEQUENCE}: this model's keys and values differ in shape, which Ulysses does not serve")
    if told.get("position_ids") is None:
        raise UserError(f"{SEQUENCE}: this model does not pass its attention the position_ids that Ulysses needs")
    of_heads = [name for name in _OF_HEADS if told.get(name) is not None]
    if of_heads:
        raise UserError(
            f"{SEQUENCE}: this model's attention has a {of_heads[0]} for each head, which Ulysses does not split"
        )


class _Masks:
    """Masks of the latest rows, one a window: all layers of a pass, and its backward, share them."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._by_window: dict[int, Tensor | None] = {}

    def of(self, positions: Tensor, window: int | None) -> Tensor | None:
        """(B, 1, T, T), true where a query sees a key; None where plain causal attention is meant. `positions` (B, T)
        restart where a document begins."""
        if self._positions is None or not torch.equal(positions, self._positions):
            self._positions, self._by_window = positions, {}
        length = positions.shape[1]
        window = min(window or length, length)
        if window not in self._by_window:
            self._by_window[window] = _mask(positions, window)
        return self._by_window[window]


def _mask(positions: Tensor, window: int) -> Tensor | None:
    length = positions.shape[1]
    begins = positions.diff(dim=1) != 1
    if window == length and not begins.any():
        return None
    documents = nn.functional.pad(begins.cumsum(1), (1, 0))
    index = torch.arange(length, device=positions.device)
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance < window)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & seen


# -- in the model's way ----------------------------------------------------------------------------------------------


def _dispatch(name: str) -> None:
    """Put a fork before transformers' attention `name`: modules that are bound take Ulysses, all others go on as ever.

    The name stays, for the places that ask for it.
    """
    if name in _dispatched:
        return
    core = ALL_ATTENTION_FUNCTIONS[name]

    def fork(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        sequence = bound(module)
        if sequence is None or not sequence.splits:
            return core(module, query, key, value, attention_mask, **kwargs)
        over_rows = sequence.masked(core) if name in _MASKED else core
        return sequence.attend(over_rows, module, query, key, value, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, fork)
    _dispatched.add(name)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(word in str(kind) for kind in named for word in _LENGTH_DEPENDENT)


def _share_longest_position(rotary: nn.Module, sequence: SequenceParallel) -> None:
    """Every rank's rotary embedding takes its frequencies from the whole rows: it is shown their longest position as
    one token more, whose cosine and sine are dropped."""
    forward = rotary.forward

    def shared(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not sequence.splits:
            return forward(x, position_ids, *args, **kwargs)
        longest = sequence.longest(position_ids).expand(len(position_ids), 1)
        cos, sin = forward(x, torch.cat([position_ids, longest], dim=1), *args, **kwargs)
        return cos[:, :-1], sin[:, :-1]

    rotary.forward = shared


def _group(size: int, timeout_s: float | None) -> Any:
    """This rank's group of `size` consecutive ranks, made once a process. Collective over all ranks."""
    if size not in _groups:
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        for first in range(0, dist.get_world_size(), size):
            members = list(range(first, first + size))
            group = torch.distributed.new_group(members, timeout=timeout)  # deepspeed.comm's takes none
            if dist.get_rank() in members:
                _groups[size] = group
    return _groups[size]
